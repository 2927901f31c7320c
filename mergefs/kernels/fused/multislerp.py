"""Multi-SLERP in one pass over the inputs, however many they are."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, addresses, empty
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024
_ZERO = np.float32(0)

MEAN: Final = 0
PROJECTIONS: Final = 1
TANGENT: Final = 2


@inlined
def _load(
    like: Any,
    stored: Any,
    address: Any,
    base: Any,
    based: Any,
    divided: Any,
    length: Any,
    first: Any,
    count: Any,
    tile: Any,
) -> Any:
    """Load a tile of one input, less the base if ``based``, and divided by its length if ``divided``."""
    for i in range(count):
        value = loaded(address, first + i, stored)
        if based:
            value = rounded(value - loaded(base, first + i, stored), like)
        if divided:
            value = rounded(value / length, like)
        tile[i] = value


@inlined
def _add_weighed(like: Any, direction: Any, weight: Any, count: Any, total: Any) -> Any:
    """Add a tile times its weight, rounded, to ``total``."""
    for i in range(count):
        total[i] += rounded(direction[i] * weight, like)


@inlined
def _round(like: Any, divisor: Any, count: Any, total: Any) -> Any:
    """Round what was added up, and divide it unless the divisor is 0."""
    for i in range(count):
        value = rounded(total[i], like)
        total[i] = rounded(value / divisor, like) if divisor != _ZERO else value


@inlined
def _add_tangent(like: Any, direction: Any, model: Any, mean: Any, count: Any, tangent: Any) -> Any:
    """Add what is left of a direction beside the mean, weighed, to ``tangent``."""
    weight, projection = model[0], model[2]
    for i in range(count):
        beside = rounded(direction[i] - rounded(projection * mean[i], like), like)
        tangent[i] += rounded(beside * weight, like)


@inlined
def _reach_mean(
    like: Any,
    stored: Any,
    addresses: Any,
    base: Any,
    based: Any,
    divided: Any,
    models: Any,
    mean_norm: Any,
    first: Any,
    count: Any,
    buffers: Any,
) -> Any:
    """Fill the buffers with a tile of each direction, and of their weighted mean, which is divided by its norm."""
    inputs = addresses.size
    mean = buffers[inputs]
    for i in range(count):
        mean[i] = _ZERO
    for k in range(inputs):
        _load(like, stored, addresses[k], base, based, divided, models[k, 1], first, count, buffers[k])
        _add_weighed(like, buffers[k], models[k, 0], count, mean)
    _round(like, mean_norm, count, mean)


@inlined
def _reach_tangent(like: Any, inputs: Any, models: Any, count: Any, buffers: Any) -> Any:
    """Fill the last buffer with the weighted sum of what is left of the directions beside the mean, not yet rounded."""
    mean, tangent = buffers[inputs], buffers[inputs + 1]
    for i in range(count):
        tangent[i] = _ZERO
    for k in range(inputs):
        _add_tangent(like, buffers[k], models[k], mean, count, tangent)


def _multislerp(
    result: Any, addresses: Any, base: Any, based: Any, models: Any, line: Any, numbers: Any, buffers: Any
) -> None:
    """Interpolate the inputs at ``addresses``, less the base at the address ``base`` where ``based`` says so.

    ``models`` has a row for each input: weight, length, and projection on the mean. ``line`` asks for the weighted sum;
    else ``numbers`` are the norm of the mean, the factors of mean and tangent, and the radius.
    ``buffers`` are a row of ``TILE`` float32 for each input, one for the mean, and one for the tangent.
    """
    inputs = addresses.size
    mean_norm, ahead, aside, radius = numbers[0], numbers[1], numbers[2], numbers[3]
    mean, tangent = buffers[inputs], buffers[inputs + 1]
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _reach_mean(result, result, addresses, base, based, not line, models, mean_norm, first, count, buffers)
        if not line:
            _reach_tangent(result, inputs, models, count, buffers)
            for i in range(count):
                turned = rounded(mean[i] * ahead, result) + rounded(rounded(tangent[i], result) * aside, result)
                mean[i] = rounded(rounded(turned, result) * radius, result)
        for i in range(count):
            value = mean[i]
            if based:
                value = rounded(value + loaded(base, first + i, result), result)
            result[first + i] = narrowed(value, result)


def _terms(
    like: Any,
    stored: Any,
    addresses: Any,
    base: Any,
    based: Any,
    models: Any,
    wanted: Any,
    mean_norm: Any,
    rows: Any,
    buffers: Any,
) -> None:
    """Fill ``rows`` (float32) with what is ``wanted``: the mean, each direction times it, or the tangent.

    The others are as in ``_multislerp``.
    """
    inputs = addresses.size
    mean, tangent = buffers[inputs], buffers[inputs + 1]
    size = np.uint64(rows.shape[1])
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _reach_mean(like, stored, addresses, base, based, True, models, mean_norm, first, count, buffers)
        if wanted == MEAN:
            for i in range(count):
                rows[0, first + i] = mean[i]
        elif wanted == PROJECTIONS:
            for k in range(inputs):
                direction, row = buffers[k], rows[k]
                for i in range(count):
                    row[first + i] = rounded(direction[i] * mean[i], like)
        else:
            _reach_tangent(like, inputs, models, count, buffers)
            for i in range(count):
                rows[0, first + i] = rounded(tangent[i], like)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.uint64,
        types.boolean,
        types.Array(types.float32, 2, "C"),
        types.boolean,
        types.Array(types.float32, 1, "C"),
        types.Array(types.float32, 2, "C"),
    )


def _signature_of_terms(element: Any) -> Any:
    """Return the signature of ``_terms`` for the element type that stands for the dtype."""
    rows = types.Array(types.float32, 2, "C")
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint32, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.uint64,
        types.boolean,
        rows,
        types.int64,
        types.float32,
        rows,
        rows,
    )


KERNEL: Final = Kernel(_multislerp, _signature)
_TERMS: Final = Kernel(_terms, _signature_of_terms)
KERNELS: Final = (KERNEL, _TERMS)


def terms(
    dtype: DType, inputs: Sequence[Raw], base: Raw | None, models: NDArray[np.float32], wanted: int, mean_norm: float
) -> NDArray[np.float32]:
    """Return the rows of ``MEAN``, ``PROJECTIONS`` or ``TANGENT``; bytes are of F32 and hold values of ``dtype``.

    ``models`` are as in ``_multislerp``; ``mean_norm`` is 0 while it is not known.
    """
    rows = np.empty((len(inputs) if wanted == PROJECTIONS else 1, inputs[0].size // F32.itemsize), dtype=np.float32)
    _TERMS.compiled(dtype)(
        empty(0, dtype),
        empty(0, F32),
        addresses(inputs),
        address(inputs[0] if base is None else base),
        base is not None,
        models,
        np.int64(wanted),
        np.float32(mean_norm),
        rows,
        np.empty((len(inputs) + 2, TILE), dtype=np.float32),
    )
    return rows
