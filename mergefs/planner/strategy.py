"""Ways to spend a budget, of which one may suit a method better than another."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Strategy:
    """What may be bought, and what it is taken to be worth.

    With ``planes`` deltas are bought by planes wherever the catalog has them, at least ``fewest_planes`` at once: a
    method that looks at single elements, as sign elections and thresholds do, may suffer from coarse ones. With
    ``angles`` the angles between experts' deltas count, else all are taken as orthogonal. With ``together`` the experts
    of a cell are bought at one level or not at all, for methods whose result is right only where all of them are.
    ``assumed_planes`` are taken to be there where none are, to tell what they would bring: nothing can be read by that.
    """

    planes: bool = True
    fewest_planes: int = 1
    angles: bool = True
    together: bool = False
    assumed_planes: int = 0


BY_WORTH = Strategy()
"""The best for methods that are linear in the deltas."""

WITHOUT_PLANES = Strategy(planes=False)
