"""Reinforced Agent Merging (arXiv 2601.13572): what one expert changed stays, what several changed is averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.sums import LANES
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    ElementSums,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
    Vector,
)

_REFERENCE = "https://arxiv.org/abs/2601.13572"
_EPSILON = Parameter(
    "epsilon", "float", Scope.GLOBAL, "a delta counts as a change where it is larger", default=1e-5, minimum=0.0
)


@dataclass(frozen=True, slots=True)
class RamCoefficients:
    """Which inputs are the base and the experts, and from which size on a delta is a change.

    ``boosts`` are the float32 factors of what each expert changed alone; None where it enters as it is.
    """

    base: int
    experts: tuple[int, ...]
    epsilon: float
    boosts: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Changes:
    """What each expert changed in a run, alone and with others; 0 elsewhere. ``divisor`` counts who changed it."""

    alone: tuple[Array, ...]
    shared: tuple[Array, ...]
    divisor: Array


class Ram(Method[RamCoefficients]):
    """An element that one expert changed takes its delta, one that several changed the mean of theirs."""

    specification = Specification(
        name="ram",
        title="Reinforced Agent Merging",
        reference=_REFERENCE,
        summary="Keeps what one expert alone changed, and averages what several changed.",
        parameters=(_EPSILON,),
        base=BasePolicy.REQUIRED,
    )

    def coefficients(self, context: TensorContext, answers: Answers) -> RamCoefficients:
        """Round epsilon to the compute dtype, which it is compared in."""
        if context.base is None:
            raise ValueError("ram needs a base")
        epsilon = Precision(context.compute).scalar(context.number("epsilon"))
        return RamCoefficients(context.base, context.experts, float(epsilon))

    def reference(self, block: Block, coefficients: RamCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        base = block.inputs[coefficients.base]
        if not coefficients.experts:
            return base
        changes = _changes(base, [block.inputs[m] for m in coefficients.experts], coefficients.epsilon, precision)
        total: Array = np.zeros_like(base)
        for alone, shared in zip(changes.alone, changes.shared, strict=True):
            total = total + precision.round(alone + precision.round(shared / changes.divisor))
        return precision.round(base + precision.round(total))

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes."""
        return ("ram",)

    def fused(self, run: RawRun, coefficients: RamCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES or not coefficients.experts:
            return None
        from mergefs.kernels.fused.ram import merge

        experts = [run.inputs[model] for model in coefficients.experts]
        return merge(run.dtype, run.inputs[coefficients.base], experts, coefficients.epsilon, coefficients.boosts)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Between 1 (changed alone) and 1 / experts (changed by all): who else changed an element decides."""
        return Response.estimated([0.0 if model == context.base else 1.0 for model in range(context.models)])


class RamPlus(Ram):
    """Boosts what an expert changed alone, the more the larger the part is that it shares with others.

    The boost is a float32, and from there on so is the sum: the result is rounded once, to the output dtype.
    """

    specification = Specification(
        name="ramplus_tl",
        title="Reinforced Agent Merging Plus (tensor-local)",
        reference=_REFERENCE,
        summary="As ram, with a boost for what one expert alone changed where it also shares much.",
        parameters=(
            Parameter("r", "float", Scope.GLOBAL, "how steeply the boost rises with the shared part", default=0.1),
            Parameter("alpha", "float", Scope.GLOBAL, "largest shared part that counts", default=0.2, minimum=0.0),
            _EPSILON,
        ),
        base=BasePolicy.REQUIRED,
        needs="how many elements each expert changed, alone and together with others",
    )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """How many elements each expert changed, alone and with others."""
        return (self._changes(context),) if context.experts else ()

    def coefficients(self, context: TensorContext, answers: Answers) -> RamCoefficients:
        """Turn the counts into a boost for each expert, by the float32 steps that torch takes."""
        plain = super().coefficients(context, answers)
        number = Precision(F32).carrier
        boosts: list[float] = []
        counts = answers.vector(self._changes(context)).reshape(-1, 2) if context.experts else np.zeros((0, 2))
        with np.errstate(all="ignore"):
            for alone, shared in counts:
                least = np.maximum(number(alone), number(context.number("epsilon")))
                part = np.clip(number(shared) / least, 0, number(context.number("alpha")))
                # With an epsilon of 0, an expert that changed nothing at all has no part in anything.
                boosts.append(1.0 if np.isnan(part) else float(number(1) + number(context.number("r")) * part))
        return RamCoefficients(plain.base, plain.experts, plain.epsilon, tuple(boosts))

    def result_dtype(self, compute: DType) -> DType:
        """The boost makes float32 of the 16 bit types."""
        return F32 if compute.bits == 16 else compute

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and one to count changes."""
        return ("ram",)

    def reference(self, block: Block, coefficients: RamCoefficients, precision: Precision) -> Array:
        """Follow the formula; the mean of shared changes is still rounded to the compute dtype."""
        base = block.inputs[coefficients.base]
        if not coefficients.experts:
            return base
        changes = _changes(base, [block.inputs[m] for m in coefficients.experts], coefficients.epsilon, precision)
        total: Array = np.zeros_like(base)
        for alone, shared, boost in zip(changes.alone, changes.shared, coefficients.boosts or (), strict=True):
            total = total + (alone * base.dtype.type(boost) + precision.round(shared / changes.divisor))
        return base + total

    def _changes(self, context: TensorContext) -> ElementSums:
        """Ask for the numbers of elements that each expert changed: alone, and then with others."""
        if context.base is None:
            raise ValueError("ramplus_tl needs a base")
        models = (*context.experts, context.base)
        epsilon = float(Precision(context.compute).scalar(context.number("epsilon")))
        terms, lanes = partial(_changed, epsilon=epsilon), partial(_lanes_of_changes, epsilon=epsilon)
        count = 2 * len(context.experts)
        return ElementSums("changed alone and by several", models, terms, (epsilon,), lanes=lanes, count=count)


def _active(base: Array, experts: Sequence[Array], epsilon: float, precision: Precision) -> tuple[list[Array], Array]:
    """Return the deltas, 0 where they are no change, and how many experts changed each element."""
    deltas = [precision.round(expert - base) for expert in experts]
    active = [(np.abs(delta) > epsilon).astype(base.dtype) for delta in deltas]
    count: Array = np.sum(active, axis=0, dtype=base.dtype)
    return [delta * changed for delta, changed in zip(deltas, active, strict=True)], count


def _changes(base: Array, experts: Sequence[Array], epsilon: float, precision: Precision) -> _Changes:
    """Return what each expert changed, alone and with others."""
    deltas, count = _active(base, experts, epsilon, precision)
    alone, shared = (count == 1).astype(base.dtype), (count > 1).astype(base.dtype)
    divisor = precision.round(np.maximum(count, base.dtype.type(1)))
    return _Changes(tuple(d * alone for d in deltas), tuple(d * shared for d in deltas), divisor)


def _changed(block: Block, precision: Precision, epsilon: float) -> Array:
    """Return two rows for each expert: 1 where it changed an element alone, and with others; the base comes last."""
    *experts, base = block.inputs
    deltas, count = _active(base, experts, epsilon, precision)
    alone, shared = count == 1, count > 1
    rows = [(delta != 0) & part for delta in deltas for part in (alone, shared)]
    changed: Array = np.stack(rows).astype(np.float32)
    return changed


def _lanes_of_changes(run: RawRun, epsilon: float) -> Vector:
    """Return what the rows of a block add up to: whole numbers, which the first lane holds."""
    from mergefs.kernels.fused.ram import tally

    *experts, base = run.inputs
    lanes: Vector = np.zeros((2 * len(experts), LANES), dtype=np.float64)
    lanes[:, 0] = tally(run.dtype, base, experts, epsilon)
    return lanes
