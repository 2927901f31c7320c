"""RAM in one pass: what one expert changed, and the mean of what several changed."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, addresses, empty, empty_result
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024
_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _count(like: Any, base: Any, addresses: Any, epsilon: Any, first: Any, here: Any, count: Any) -> Any:
    """Count for each element of a tile the experts that changed it by more than ``epsilon``."""
    for i in range(here):
        count[i] = _ZERO
    for k in range(addresses.size):
        address = addresses[k]
        for i in range(here):
            delta = rounded(loaded(address, first + i, like) - loaded(base, first + i, like), like)
            count[i] += _ONE if abs(delta) > epsilon else _ZERO


@inlined
def _changed(delta: Any, epsilon: Any) -> Any:
    """Return a delta, 0 where it is no change. Multiplying by 0 is what makes infinity NaN, as the formula does."""
    return delta * (_ONE if abs(delta) > epsilon else _ZERO)


def _ram(result: Any, base: Any, addresses: Any, epsilon: Any, boosts: Any, count: Any, total: Any) -> None:
    """Add to the base at the address ``base`` what the experts at ``addresses`` changed by more than ``epsilon``.

    With ``boosts``, one for each expert, all sums are in float32. ``count`` and ``total`` are buffers of ``TILE``
    float32.
    """
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        here = min(np.uint64(TILE), size - first)
        _count(result, base, addresses, epsilon, first, here, count)
        for i in range(here):
            total[i] = _ZERO
        for k in range(addresses.size):
            address = addresses[k]
            boosted = boosts.size > 0
            boost = boosts[k] if boosted else _ONE
            for i in range(here):
                delta = rounded(loaded(address, first + i, result) - loaded(base, first + i, result), result)
                delta = _changed(delta, epsilon)
                alone = delta * (_ONE if count[i] == _ONE else _ZERO)
                shared = delta * (_ONE if count[i] > _ONE else _ZERO)
                divisor = rounded(count[i] if count[i] > _ONE else _ONE, result)
                mean = rounded(shared / divisor, result)
                total[i] += alone * boost + mean if boosted else rounded(alone + mean, result)
        for i in range(here):
            value = total[i] if boosts.size else rounded(total[i], result)
            value = loaded(base, first + i, result) + value
            result[first + i] = narrowed(rounded(value, result), result)


def _tally(like: Any, base: Any, addresses: Any, epsilon: Any, size: Any, counts: Any, count: Any) -> None:
    """Count for each expert what it changed of ``size`` elements, alone and with others: two ``counts`` for each."""
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        here = min(np.uint64(TILE), size - first)
        _count(like, base, addresses, epsilon, first, here, count)
        for k in range(addresses.size):
            address, alone, shared = addresses[k], np.int32(0), np.int32(0)
            for i in range(here):
                delta = rounded(loaded(address, first + i, like) - loaded(base, first + i, like), like)
                changed = _changed(delta, epsilon) != _ZERO
                alone += np.int32(changed & (count[i] == _ONE))
                shared += np.int32(changed & (count[i] > _ONE))
            counts[2 * k] += alone
            counts[2 * k + 1] += shared


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.Array(types.uint64, 1, "C"),
        types.float32,
        types.Array(types.float32, 1, "C"),
        types.Array(types.float32, 1, "C"),
        types.Array(types.float32, 1, "C"),
    )


def _signature_of_tally(element: Any) -> Any:
    """Return the signature of ``_tally`` for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.Array(types.uint64, 1, "C"),
        types.float32,
        types.uint64,
        types.Array(types.int64, 1, "C"),
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_ram, _signature)
_TALLY: Final = Kernel(_tally, _signature_of_tally)
KERNELS: Final = (KERNEL, _TALLY)


def merge(dtype: DType, base: Raw, experts: Sequence[Raw], epsilon: float, boosts: Sequence[float] | None) -> Raw:
    """Return the merged bytes, of ``dtype``; with ``boosts``, one for each expert, of what each changed alone."""
    result, buffers = empty_result(base, dtype), np.empty((2, TILE), dtype=np.float32)
    factors = np.array(boosts or (), dtype=np.float32)
    kernel = KERNEL.compiled(dtype)
    kernel(result, address(base), addresses(experts), np.float32(epsilon), factors, buffers[0], buffers[1])
    merged: Raw = result.view(np.uint8)
    return merged


def tally(dtype: DType, base: Raw, experts: Sequence[Raw], epsilon: float) -> NDArray[np.int64]:
    """Return for each expert how many elements it changed alone, and then how many together with others."""
    counts = np.zeros(2 * len(experts), dtype=np.int64)
    size, count = np.uint64(base.size // dtype.itemsize), np.empty(TILE, dtype=np.float32)
    inputs = empty(0, dtype), address(base), addresses(experts)
    _TALLY.compiled(dtype)(*inputs, np.float32(epsilon), size, counts, count)
    return counts
