"""Which elements of a delta survive pruning, in the form that the compiled kernels take."""

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, DType
from mergefs.kernels.precision import Precision, Raw
from mergefs.kernels.random import UNIFORM_BITS
from mergefs.methods.contract import Threshold
from mergefs.methods.masks import KeepLargest, KeepNone, KeepRandom, KeepRanked, Mask, probabilities

_NAN_BITS: Final = 0x7FFFFFFF
"""The largest pattern of a float32 magnitude; only a NaN reaches it."""


def fused_mask(mask: Mask, dtype: DType, marks: NDArray[np.uint8] | None) -> dict[str, Any]:
    """Return the fields by which the fused kernel knows which elements survive; ``marks`` are the survivors by rank."""
    import mergefs.kernels.fused.task_vector as kernel
    from mergefs.kernels.fused.memory import address

    if marks is not None:
        return {"mask": kernel.KEEP_MARKED, "marks": address(marks)}

    if isinstance(mask, KeepRandom):
        return {"mask": kernel.KEEP_RANDOM, "key": mask.key, "limit": mask.limit}
    if isinstance(mask, KeepLargest):
        before, after = _limits(mask.threshold, dtype)
        fields = {"mask": kernel.KEEP_LARGEST, "cut": mask.threshold.cut, "limit_before": before, "limit_after": after}
        if mask.outliers is not None:
            before, after = _limits(mask.outliers, dtype)
            fields |= {"outlier_cut": mask.outliers.cut, "outlier_before": before, "outlier_after": after}
        return fields
    if isinstance(mask, KeepNone):
        return {"mask": kernel.KEEP_LARGEST, "limit_after": _NAN_BITS}
    return {}


def _limits(threshold: Threshold, dtype: DType) -> tuple[int, int]:
    """Return the float32 bits of the smallest magnitude that survives ``threshold`` before its cut, and after it."""
    return _magnitude_bits(threshold.key, dtype), _magnitude_bits(threshold.key + 1, dtype)


def _magnitude_bits(key: int, dtype: DType) -> int:
    """Return the float32 bits of the magnitude that ``key`` stands for in ``dtype``.

    Never above the largest NaN: whether a NaN is kept makes no difference, it stays NaN.
    """
    if dtype == BF16:
        key <<= 16
    elif dtype == F16:
        key = int(np.array([min(key, 0x7FFF)], dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)[0])
    return min(key, _NAN_BITS)


@lru_cache(maxsize=64)
def _limits_of_ranks(row: int, density: float, epsilon: float, precision: Precision) -> NDArray[np.uint32]:
    """Return below which draw an element of each rank survives: the probabilities of a row as whole numbers."""
    chances = probabilities(KeepRanked(0, row, density, epsilon), precision).astype(np.float64)
    return np.ceil(np.maximum(chances, 0) * 2.0**UNIFORM_BITS).astype(np.uint32)


def survivors_by_rank(mask: KeepRanked, expert: Raw, base: Raw, start: int, dtype: DType) -> NDArray[np.uint8]:
    """Return what ``kept`` does of a delta, by a compiled kernel, from the bytes of whole rows in ``dtype``."""
    from mergefs.kernels.fused.ranking import survivors

    limits = _limits_of_ranks(mask.row, mask.density, mask.epsilon, Precision(dtype))
    return survivors(dtype, expert, base, start, mask.key, limits)
