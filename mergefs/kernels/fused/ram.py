"""RAM in one pass: what one expert changed, and the mean of what several changed."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, addresses, empty, empty_result
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024
_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _count(like: Any, stored: Any, base: Any, addresses: Any, epsilon: Any, first: Any, here: Any, count: Any) -> Any:
    """Count for each element of a tile the experts that changed it by more than ``epsilon``."""
    for i in range(here):
        count[i] = _ZERO
    for k in range(addresses.size):
        address = addresses[k]
        for i in range(here):
            delta = rounded(loaded(address, first + i, stored) - loaded(base, first + i, stored), like)
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
        _count(result, result, base, addresses, epsilon, first, here, count)
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


def _shares(like: Any, stored: Any, base: Any, addresses: Any, epsilon: Any, rows: Any, count: Any) -> None:
    """Fill two rows for each expert with 1 where it changed an element: alone, and together with others."""
    size = np.uint64(rows.shape[1])
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        here = min(np.uint64(TILE), size - first)
        _count(like, stored, base, addresses, epsilon, first, here, count)
        for k in range(addresses.size):
            address, alone, shared = addresses[k], rows[2 * k], rows[2 * k + 1]
            for i in range(here):
                delta = rounded(loaded(address, first + i, stored) - loaded(base, first + i, stored), like)
                changed = _changed(delta, epsilon) != _ZERO
                alone[first + i] = _ONE if changed & (count[i] == _ONE) else _ZERO
                shared[first + i] = _ONE if changed & (count[i] > _ONE) else _ZERO


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


def _signature_of_shares(element: Any) -> Any:
    """Return the signature of ``_shares`` for the element type that stands for the dtype."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint32, 1, "C"),
        types.uint64,
        types.Array(types.uint64, 1, "C"),
        types.float32,
        types.Array(types.float32, 2, "C"),
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_ram, _signature)
_SHARES: Final = Kernel(_shares, _signature_of_shares)
KERNELS: Final = (KERNEL, _SHARES)


def merge(dtype: DType, base: Raw, experts: Sequence[Raw], epsilon: float, boosts: Sequence[float] | None) -> Raw:
    """Return the merged bytes, of ``dtype``; with ``boosts``, one for each expert, of what each changed alone."""
    result, buffers = empty_result(base, dtype), np.empty((2, TILE), dtype=np.float32)
    factors = np.array(boosts or (), dtype=np.float32)
    kernel = KERNEL.compiled(dtype)
    kernel(result, address(base), addresses(experts), np.float32(epsilon), factors, buffers[0], buffers[1])
    merged: Raw = result.view(np.uint8)
    return merged


def shares(dtype: DType, base: Raw, experts: Sequence[Raw], epsilon: float) -> NDArray[np.float32]:
    """Return two rows for each expert: 1 where it changed an element alone, and where it did so with others.

    Bytes are of float32, and hold values of ``dtype``.
    """
    rows = np.empty((2 * len(experts), base.size // F32.itemsize), dtype=np.float32)
    count = np.empty(TILE, dtype=np.float32)
    kernel = _SHARES.compiled(dtype)
    kernel(empty(0, dtype), empty(0, F32), address(base), addresses(experts), np.float32(epsilon), rows, count)
    return rows
