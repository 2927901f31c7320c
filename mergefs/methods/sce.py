"""SCE (Wan et al. 2024, "FuseChat", arXiv 2408.07990): select by variance, weigh by energy, erase minority signs."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.sums import LANES
from mergefs.methods.contract import (
    NO_ANSWERS,
    Answers,
    BasePolicy,
    Block,
    ElementSum,
    ElementSums,
    ElementThreshold,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
    Threshold,
    Vector,
)
from mergefs.methods.sums import RANKS

_SMALLEST_ENERGY: Final = 1e-6
_SMALLEST_DIVISOR: Final = 1e-6
_NAN_BITS: Final = 0x7FFFFFFF
"""What stands for every NaN where bits of magnitudes are compared."""

_ABOVE_ALL: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class SelectAll:
    """Every element is selected."""


@dataclass(frozen=True, slots=True)
class SelectNone:
    """No element is selected."""


Selected = SelectAll | SelectNone | Threshold
"""Which elements are selected; a threshold is one of the variance."""


@dataclass(frozen=True, slots=True)
class SceCoefficients:
    """Which elements are selected, and the weight of each expert: a value of the compute dtype."""

    base: int
    experts: tuple[int, ...]
    selected: Selected
    weights: tuple[float, ...]


class Sce(Method[SceCoefficients]):
    """``base + sum(w_k * d_k) / sum(w_k)`` over the experts that have the majority's sign, at selected elements."""

    specification = Specification(
        name="sce",
        title="SCE",
        reference="https://arxiv.org/abs/2408.07990",
        summary="Selects the elements that vary most, weighs experts by their energy there, and erases minority signs.",
        parameters=(
            Parameter(
                "select_topk",
                "float",
                Scope.GLOBAL,
                "share of the elements with any variance across experts that is selected, the largest variances first",
                default=1.0,
                minimum=0.0,
                maximum=1.0,
            ),
            Parameter("int8_mask", "bool", Scope.GLOBAL, "accepted for mergekit; changes nothing", default=False),
        ),
        base=BasePolicy.REQUIRED,
        needs="how many elements vary and which vary most, where only some are selected; then the energy of each delta",
    )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """How many elements vary, where only some of these are selected; else the energies."""
        if not context.experts:
            return ()
        if 0 < context.number("select_topk") < 1:
            return (_varying(context),)
        selected = _selected(context, NO_ANSWERS)
        return () if isinstance(selected, SelectNone) else (_energies(context, selected),)

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """The threshold of the variance, then the energies of what it selects."""
        if not context.experts:
            return ()
        threshold = _variance_threshold(context, answers)
        if threshold is not None and threshold not in answers:
            return (threshold,)
        selected = _selected(context, answers)
        if isinstance(selected, SelectNone):
            return ()
        energies = _energies(context, selected)
        return () if energies in answers else (energies,)

    def coefficients(self, context: TensorContext, answers: Answers) -> SceCoefficients:
        """Turn the energies into weights, by the steps of rounding that torch takes."""
        if context.base is None:
            raise ValueError("sce needs a base")
        if not context.experts:
            return SceCoefficients(context.base, (), SelectNone(), ())
        precision = Precision(context.compute)
        kind = precision.carrier
        selected = _selected(context, answers)
        count = len(context.experts)
        energies = [kind(0)] * count
        if context.size and not isinstance(selected, SelectNone):
            sums = answers.vector(_energies(context, selected))
            energies = [kind(precision.scalar(float(total) / context.size)) for total in sums]
        total = kind(0)
        for energy in energies:
            total = kind(total + energy)
        whole = precision.scalar(float(total))
        if abs(float(whole)) < _SMALLEST_ENERGY:
            weights = [precision.scalar(1 / count)] * count
        else:
            with np.errstate(all="ignore"):
                weights = [precision.scalar(float(energy / whole)) for energy in energies]
        return SceCoefficients(context.base, context.experts, selected, tuple(map(float, weights)))

    def reference(self, block: Block, coefficients: SceCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        base = block.inputs[coefficients.base]
        if not coefficients.experts:
            return base
        kind = precision.carrier
        experts = [block.inputs[model] for model in coefficients.experts]
        deltas = _selected_deltas(base, experts, coefficients.selected, block.start, precision)
        majority = np.where(precision.round(_sum(deltas)) >= 0, 1, -1).astype(kind)
        weights = [
            kind(weight) * (np.sign(delta) == majority)
            for weight, delta in zip(coefficients.weights, deltas, strict=True)
        ]
        mixed = precision.round(_sum([precision.round(d * w) for d, w in zip(deltas, weights, strict=True)]))
        divisor = np.maximum(precision.round(_sum(weights)), precision.scalar(_SMALLEST_DIVISOR))
        return precision.round(base + precision.round(mixed / divisor))

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and one for each number that it needs to know."""
        return ("sce", *RANKS)

    def fused(self, run: RawRun, coefficients: SceCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES or not coefficients.experts:
            return None
        from mergefs.kernels.fused.sce import merge

        inputs = [run.inputs[model] for model in (*coefficients.experts, coefficients.base)]
        precision = Precision(run.dtype)
        selection = _fused_selection(coefficients.selected, precision)
        smallest = float(precision.scalar(_SMALLEST_DIVISOR))
        return merge(run.dtype, inputs, coefficients.weights, smallest, run.start, selection)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Between 1 (alone with its sign) and 1 / experts; an estimate, since weights and signs are elected."""
        return Response.estimated([0.0 if model == context.base else 1.0 for model in range(context.models)])


def _sum(terms: list[Array]) -> Array:
    """Return the sum of ``terms``, accumulated in order from zero."""
    total: Array = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _inputs(context: TensorContext) -> tuple[int, ...]:
    """Return the inputs that every statistic looks at: the experts, then the base."""
    if context.base is None:
        raise ValueError("sce needs a base")
    return (*context.experts, context.base)


def _variance(deltas: list[Array], precision: Precision) -> Array:
    """Return the variance of each element across the experts, taken in float64 and rounded once, as torch does."""
    mean: Array = np.zeros(deltas[0].shape, dtype=np.float64)
    squares: Array = np.zeros(deltas[0].shape, dtype=np.float64)
    for number, delta in enumerate(deltas, start=1):
        distance = delta - mean
        mean = mean + distance / number
        squares = squares + distance * (delta - mean)
    return precision.round((squares / len(deltas)).astype(precision.carrier))


def _selected_deltas(
    base: Array, experts: list[Array], selected: Selected, start: int, precision: Precision
) -> list[Array]:
    """Return the deltas of a run of elements, 0 where these are not selected."""
    deltas = [precision.round(expert - base) for expert in experts]
    if isinstance(selected, SelectAll):
        return deltas
    if isinstance(selected, SelectNone):
        return [delta * base.dtype.type(0) for delta in deltas]
    keys = precision.order_keys(_variance(deltas, precision))
    kept = selected.keeps(keys, start).astype(base.dtype)
    return [delta * kept for delta in deltas]


def _variances_of_block(block: Block, precision: Precision) -> Array:
    *experts, base = block.inputs
    return _variance([precision.round(expert - base) for expert in experts], precision)


def _varying_of_block(block: Block, precision: Precision) -> Array:
    varying: Array = (_variances_of_block(block, precision) != 0).astype(np.float64)
    return varying


def _varying(context: TensorContext) -> ElementSum:
    """Ask for the number of elements that vary across the experts."""
    return ElementSum("varying elements", _inputs(context), _varying_of_block, lanes=_lanes_of_varying)


def _variance_threshold(context: TensorContext, answers: Answers) -> ElementThreshold | None:
    """Ask for the threshold of the variance, where it selects some elements and not all."""
    share = context.number("select_topk")
    if not 0 < share < 1:
        return None
    # mergekit multiplies in float32.
    varying = answers.number(_varying(context))
    keep = min(int(np.float32(varying) * np.float32(share)), context.size)
    if not keep:
        return None
    return ElementThreshold("variance", _inputs(context), _variances_of_block, fused=_variances_fused, keep=keep)


def _selected(context: TensorContext, answers: Answers) -> Selected:
    """Return which elements are selected."""
    if context.number("select_topk") >= 1:
        return SelectAll()
    threshold = _variance_threshold(context, answers)
    return SelectNone() if threshold is None else answers.limit(threshold)


def _energies(context: TensorContext, selected: Selected) -> ElementSums:
    """Ask for the sum of the squares of each expert's selected delta."""

    def squares(block: Block, precision: Precision) -> Array:
        *experts, base = block.inputs
        deltas = _selected_deltas(base, experts, selected, block.start, precision)
        return np.stack([precision.round(delta * delta) for delta in deltas])

    def lanes(run: RawRun) -> Vector:
        from mergefs.kernels.fused.sce import energies

        return energies(run.dtype, run.inputs, run.start, _fused_selection(selected, Precision(run.dtype)))

    share, count = context.number("select_topk"), len(context.experts)
    return ElementSums("selected energies", _inputs(context), squares, (share,), lanes=lanes, count=count)


def _variances_fused(block: Block, precision: Precision) -> Array:
    from mergefs.kernels.fused.sce import variances

    raws = [np.ascontiguousarray(values, dtype=np.float32).view(np.uint8) for values in block.inputs]
    return variances(precision.dtype, raws)


def _lanes_of_varying(run: RawRun) -> Vector:
    """Return what a block adds up to: a whole number, which the first lane holds."""
    from mergefs.kernels.fused.sce import varying

    lanes: Vector = np.zeros((1, LANES), dtype=np.float64)
    lanes[0, 0] = varying(run.dtype, run.inputs)
    return lanes


def _fused_selection(selected: Selected, precision: Precision) -> tuple[int, NDArray[np.int64]]:
    """Return what is selected in the form that kernels take: see ``mergefs.kernels.fused.sce``."""
    import mergefs.kernels.fused.sce as kernel

    if isinstance(selected, SelectAll):
        return kernel.SELECT_ALL, np.zeros(3, dtype=np.int64)
    if isinstance(selected, SelectNone):
        return kernel.SELECT_NONE, np.zeros(3, dtype=np.int64)
    before, after = (_variance_bits(key, precision) for key in (selected.key, selected.key + 1))
    return kernel.SELECT_LARGEST, np.array([selected.cut, before, after], dtype=np.int64)


def _variance_bits(key: int, precision: Precision) -> int:
    """Return the bits of the smallest float32 from 0 on whose order key is at least ``key``."""
    zero, nan = 1 << (precision.order_bits - 1), (1 << precision.order_bits) - 1
    if key <= zero:
        return 0
    if key > nan:
        return _ABOVE_ALL
    value = np.float32(precision.of_order_key(key))
    return _NAN_BITS if np.isnan(value) else int(value.view(np.uint32))
