"""Reinforced Agent Merging (arXiv 2601.13572): what one expert changed stays, what several changed is averaged."""

from dataclasses import dataclass

import numpy as np

from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    Method,
    Parameter,
    Scope,
    Specification,
    TensorContext,
)

_EPSILON = Parameter(
    "epsilon", "float", Scope.GLOBAL, "a delta counts as a change where it is larger", default=1e-5, minimum=0.0
)


@dataclass(frozen=True, slots=True)
class RamCoefficients:
    """Which inputs are the base and the experts, and from which size on a delta is a change."""

    base: int
    experts: tuple[int, ...]
    epsilon: float


class Ram(Method[RamCoefficients]):
    """An element that one expert changed takes its delta, one that several changed the mean of theirs."""

    specification = Specification(
        name="ram",
        title="Reinforced Agent Merging",
        reference="https://arxiv.org/abs/2601.13572",
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
        deltas = [precision.round(block.inputs[model] - base) for model in coefficients.experts]
        active = [(np.abs(delta) > coefficients.epsilon).astype(base.dtype) for delta in deltas]
        count: Array = np.sum(active, axis=0, dtype=base.dtype)
        alone, shared = (count == 1).astype(base.dtype), (count > 1).astype(base.dtype)
        divisor = precision.round(np.maximum(count, base.dtype.type(1)))
        total: Array = np.zeros_like(base)
        for delta, counts in zip(deltas, active, strict=True):
            changed = delta * counts
            total = total + precision.round(changed * alone + precision.round(changed * shared / divisor))
        return precision.round(base + precision.round(total))

    def sensitivity(self, context: TensorContext) -> tuple[float, ...]:
        """Between 1 (changed alone) and 1 / experts (changed by all)."""
        return tuple(0.0 if model == context.base else 1.0 for model in range(context.models))
