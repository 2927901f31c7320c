"""What is claimed of each method against mergekit 0.1.5: the tests hold it against that, ``docs/parity.md`` says it.

Two comparisons are made. In the one, what mergekit leaves to chance or to the machine is fixed (``oracle``): which of
equal magnitudes survives, which elements a random mask keeps, and how far float32 sums are off. In the other mergekit
is as it is, and the two may differ in what was fixed and in nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Limits:
    """By how much results may differ, in units in the last place; 0 stands for the same bits."""

    float32: float
    bfloat16: float
    float16: float

    def __getitem__(self, dtype: str) -> float:
        limit: float = getattr(self, dtype)
        return limit


NONE: Final = Limits(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Break:
    """Why mergekit makes NaN or infinity of finite inputs, and in which dtypes (none named: all). Ours is finite."""

    reason: str
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """How far a method may be from mergekit, in units in the last place, by dtype.

    ``fixed`` bounds it where nothing is left to chance: 0 is bit for bit. ``untouched`` bounds it against mergekit as
    it is, outside the elements of which chance or a single rounding decides whether they take part (``selects`` is set
    where there are such), and ``reason`` says why they differ at all (empty: they do not). ``random`` is set where
    chance decides on all elements: then nothing is compared with mergekit as it is. ``widened`` is set where mergekit
    returns float32 whatever the dtype, and ours is that, rounded. ``breaks`` allows mergekit to break, and ``fails``
    says where it fails because of the values that it merges, and what is done here.
    """

    reason: str = ""
    untouched: Limits = NONE
    fixed: Limits = NONE
    selects: bool = False
    random: bool = False
    widened: bool = False
    breaks: Break | None = None
    fails: str = ""

    @property
    def identical(self) -> bool:
        """Whether mergekit as it is gives the same bits."""
        return not self.reason

    def may_break(self, dtype: str) -> bool:
        """Whether mergekit may make NaN or infinity of finite inputs in a dtype."""
        return self.breaks is not None and (not self.breaks.dtypes or dtype in self.breaks.dtypes)


_TIES = (
    "which of several equal magnitudes survives a density is open in mergekit, whose sort is not stable; here it is "
    "those of the lowest flat indices"
)
_RESCALE = (
    "`rescale` divides sums of magnitudes, which torch takes in float32 in an order of its own, so that the factor is "
    "off by some roundings, which `normalize` multiplies where weights nearly cancel; here they are taken in float64"
)
_MASK = "the random masks come from another generator"
_ANGLES = (
    "the sines and arc cosines of torch's mathematical library are off in their last bits; here they are rounded from "
    "float64"
)
_PRODUCTS = (
    "inner products are summed in float32 in an order of torch's own, and the sines and arc cosines of its "
    "mathematical library are off in their last bits; here they are taken in float64"
)

_ZERO_SUM = Break(
    "with `normalize` mergekit divides by weights that sum to zero, because its guard, 1e-8, is zero itself; here "
    "nothing is divided by such a sum, as in the other dtypes",
    ("float16",),
)
_NO_DIRECTION = Break(
    "what equals the base has no length, and mergekit divides by it where `eps` is zero, as 1e-8 is in float16; here "
    "it has no direction and adds nothing"
)
_NO_PART = Break(
    "with an `epsilon` of zero mergekit divides zero by zero for an expert that changed nothing in a tensor; here it "
    "has no part in it"
)
_NO_ANGLE = Break(
    "with a `tol` of zero mergekit divides angles of zero by their sine; here such an angle pulls nowhere"
)

_PRUNED = Claim(f"{_TIES}. {_RESCALE}", Limits(32, 2, 2), selects=True)
_RANDOM = Claim(f"{_MASK}; `rescale` takes the paper's factor, 1/density, in place of a ratio of sums", random=True)
_RANKED = Claim(f"{_MASK}; {_RESCALE}", random=True)

CLAIMS: Final[Mapping[str, Claim]] = MappingProxyType(
    {
        "slerp": Claim(_PRODUCTS, Limits(16, 1, 1)),
        "nuslerp": Claim(_ANGLES, Limits(16, 1, 1)),
        "multislerp": Claim(
            "norms and inner products of float16 are summed in an order that depends on torch's threads, each is "
            "rounded to the dtype, and the result is scaled by them; here they are taken in float64",
            Limits(0, 0, 8),
            breaks=_NO_DIRECTION,
            fails="the mean of three or more directions vanishes, as where all experts equal the base; here the "
            "weighted sum is taken",
        ),
        "karcher": Claim(
            f"{_PRODUCTS}. In float16 a cosine near 1 has steps of 0.0005, so that one rounding decides on an angle, "
            "and on the whole tensor with it",
            Limits(16, 1, 2),
            selects=True,
            breaks=_NO_ANGLE,
        ),
        "task_arithmetic": Claim(breaks=_ZERO_SUM),
        "ties": _PRUNED,
        "dare_linear": replace(_RANDOM, breaks=_ZERO_SUM),
        "dare_ties": _RANDOM,
        "breadcrumbs": replace(_PRUNED, breaks=_ZERO_SUM),
        "breadcrumbs_ties": _PRUNED,
        "della": _RANKED,
        "della_linear": replace(_RANKED, breaks=_ZERO_SUM),
        "sce": Claim(
            "which of several equal variances are selected is open in mergekit; here it is those of the lowest flat "
            "indices. What is selected changes the energies that experts are weighed by, whose means are taken in "
            "float32 in an order of torch's own; in float16 small energies are subnormal and have few digits",
            Limits(16, 4, 16),
            selects=True,
        ),
        "model_stock": Claim(
            "norms, inner products and means of float16 are summed in an order that depends on torch's threads; here "
            "they are taken in float64",
            Limits(0, 0, 4),
        ),
        "ramplus_tl": Claim(breaks=_NO_PART, widened=True),
        "arcee_fusion": Claim(
            "exponentials, logarithms and their sums are torch's own in float32, where terms of both signs nearly "
            "cancel; here they are taken in float64. So an element whose importance barely reaches the threshold can "
            "be taken over in one and not in the other",
            selects=True,
            widened=True,
        ),
    }
)


def claim(method: str) -> Claim:
    """Return what is claimed of a method: the same bits, where nothing else is written down here."""
    return CLAIMS.get(method, Claim())
