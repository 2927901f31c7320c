"""One block of a merged tensor, from what is bought of its inputs."""

from typing import Any

import numpy as np

from mergefs.engine.compute import convert, run_kernel
from mergefs.engine.inputs import InputReader, Run
from mergefs.kernels.precision import Raw
from mergefs.planner.plan import TensorPlan
from mergefs.sources.ledger import Purpose
from mergefs.statistics.service import StatisticsService


def coefficients_of(tensor: TensorPlan, statistics: StatisticsService) -> Any:
    """Return the coefficients of a tensor's method, gathering what the catalog lacks of its statistics."""
    method, context = tensor.method, tensor.context
    if method is None or context is None:
        raise ValueError("a copied tensor has no coefficients")
    # A number of the recipe may be too large for a dtype: what comes of it is looked at in the results.
    with np.errstate(all="ignore"):
        return method.coefficients(context, statistics.all_answers(method, context, tensor.places))


def merge_block(
    tensor: TensorPlan,
    coefficients: Any,
    reader: InputReader,
    block: int,
    purpose: Purpose,
    into: Raw | None = None,
) -> tuple[Raw, tuple[Run, ...]]:
    """Return the bytes of a block of a merged tensor, and the inputs that it was computed from.

    There are none where the block is the base's. The bytes may lie in ``into``, where one is given.
    """
    if tensor.method is None:
        raise ValueError("a copied tensor is not merged")
    selection = tensor.selection
    if selection is not None and not selection.computed[block]:
        stand_in, dtype = reader.stand_in(tensor, block, purpose)
        return convert(stand_in, dtype, tensor.compute, tensor.dtype), ()
    inputs = reader.inputs(tensor, block, purpose)
    taken = None if tensor.context is None else tensor.method.taken_as_it_is(tensor.context)
    if taken is not None:
        raw, dtype = inputs[taken]
        return convert(raw, dtype, tensor.compute, tensor.dtype), inputs
    start, _ = tensor.grid.bounds(block)
    merged = run_kernel(tensor.method, coefficients, inputs, tensor.compute, tensor.dtype, start, into=into)
    return merged, inputs
