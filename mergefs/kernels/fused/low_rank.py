"""A weight and the product of two thin factors in one pass: fused multiply-adds in float32 in the order of the rank."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty_result
from mergefs.kernels.fused.values import fused_multiply_add, loaded, narrowed, rounded
from mergefs.kernels.low_rank import Product
from mergefs.kernels.precision import Raw

TILE: Final = 1024
_ZERO = np.float32(0)
_NAN = np.float32(np.nan)
_1, _2, _3, _STEPS = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)


def _add_product(result: Any, weight: Any, left: Any, right: Any, scaling: Any, rounds_delta: Any, total: Any) -> None:
    """Write ``weight + scaling * left @ right`` into ``result``, row by row; ``total`` is a buffer of ``TILE``."""
    rows, rank, columns = np.uint64(left.shape[0]), np.uint64(left.shape[1]), np.uint64(right.shape[1])
    whole = rank - rank % _STEPS
    for row in range(rows):
        for first in range(np.uint64(0), columns, np.uint64(TILE)):
            count = min(np.uint64(TILE), columns - first)
            for i in range(count):
                total[i] = _ZERO
            # Four steps at a time, in their order, so that the totals stay in registers that long.
            for k in range(np.uint64(0), whole, _STEPS):
                one, two, three, four = left[row, k], left[row, k + _1], left[row, k + _2], left[row, k + _3]
                for i in range(count):
                    value = fused_multiply_add(right[k, first + i], one, total[i])
                    value = fused_multiply_add(right[k + _1, first + i], two, value)
                    value = fused_multiply_add(right[k + _2, first + i], three, value)
                    total[i] = fused_multiply_add(right[k + _3, first + i], four, value)
            for k in range(whole, rank):
                factor = left[row, k]
                for i in range(count):
                    total[i] = fused_multiply_add(right[k, first + i], factor, total[i])
            begin = row * columns + first
            for i in range(count):
                delta = total[i] * scaling
                if rounds_delta:
                    # A NaN of the factors may have ones where rounding to 16 bits would carry them out of the NaN.
                    delta = rounded(delta if delta == delta else _NAN, result)
                value = loaded(weight, begin + i, result) + delta
                result[begin + i] = narrowed(rounded(value if value == value else _NAN, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        # Factors are kept for other blocks, so that nobody may write to them.
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.float32,
        types.boolean,
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_add_product, _signature)


def add_product(weight: Raw, dtype: DType, product: Product, rounds_delta: bool) -> Raw:
    """Return what ``low_rank.add_product`` does to ``weight``, the bytes of whole rows of ``dtype``, as bytes."""
    result = empty_result(weight, dtype)
    KERNEL.compiled(dtype)(
        result,
        address(weight),
        np.ascontiguousarray(product.left, dtype=np.float32),
        np.ascontiguousarray(product.right, dtype=np.float32),
        np.float32(product.scaling),
        rounds_delta,
        np.empty(TILE, dtype=np.float32),
    )
    total: Raw = result.view(np.uint8)
    return total
