"""How far two merges are apart, element by element."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensors import Tensors, bits, unit_in_the_last_place


@dataclass(frozen=True, slots=True)
class Difference:
    """What a comparison of merges found; two add up to that of both.

    ``differing`` counts elements that differ in any bit (NaN equals NaN), ``by_chance`` those of them of which chance
    (or a single rounding) decides whether they take part, and ``broken`` those where mergekit makes NaN or infinity of
    inputs that are finite, and we do not.
    ``units`` is the largest of the other differences, in units in the last place of the dtype, at the largest of the
    inputs and of both results there: it is their rounding that differs.
    """

    elements: int = 0
    differing: int = 0
    by_chance: int = 0
    broken: int = 0
    units: float = 0.0

    @property
    def unexplained(self) -> int:
        """How many elements differ for no other reason than rounding."""
        return self.differing - self.by_chance - self.broken

    def within(self, units: float) -> bool:
        """Return whether the merges are at most so far apart by rounding; 0 stands for the same bits."""
        return self.units <= units and (units > 0 or self.unexplained == 0)

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.elements + other.elements,
            self.differing + other.differing,
            self.by_chance + other.by_chance,
            self.broken + other.broken,
            max(self.units, other.units),
        )


NOTHING = Difference()


def difference(
    ours: Tensors,
    theirs: Tensors,
    inputs: Sequence[Tensors],
    by_chance: Callable[[str], torch.Tensor | None] = lambda name: None,
) -> Difference:
    """Return how ``ours`` differs from ``theirs``, which must have the same shapes and dtypes.

    Tensors that ``theirs`` lacks are not compared. ``by_chance`` says of which elements of a tensor chance decides.
    """
    total = NOTHING
    for name, their in theirs.items():
        our = ours[name]
        assert (our.dtype, our.shape) == (their.dtype, their.shape), name
        differs = (bits(our) != bits(their)) & ~(our.isnan() & their.isnan())
        total += Difference(our.numel(), int(differs.sum()))
        present = [tensors[name] for tensors in inputs if name in tensors]
        finite = torch.stack([tensor.isfinite() for tensor in (our, *present)]).all(dim=0)
        broken = differs & finite & ~their.isfinite()
        differs &= ~broken
        decided = by_chance(name) if differs.any() else None
        by_it = torch.zeros_like(differs) if decided is None else differs & decided
        total += Difference(by_chance=int(by_it.sum()), broken=int(broken.sum()))
        differs &= ~by_it
        if differs.any():
            sizes = [tensor[differs].double().abs() for tensor in (our, their, *present)]
            unit = unit_in_the_last_place(torch.stack(sizes).amax(0).to(our.dtype))
            apart = (our[differs].double() - their[differs].double()).abs() / unit
            total += Difference(units=float(apart.nan_to_num(nan=torch.inf).max()))
    return total
