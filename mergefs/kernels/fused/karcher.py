"""The steps of the Karcher mean in one pass over the inputs, however many they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import addresses, aligned_bytes, empty, empty_result, view
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024
_ZERO = np.float32(0)

NUMBERS: Final = 4
"""Columns of ``steps``: norm of the tangent (0: not known), factors of mean and tangent, norm of the mean (0: none)."""


def _karcher(
    result: Any,
    like: Any,
    stored: Any,
    means: Any,
    tangents: Any,
    addresses: Any,
    norms: Any,
    start: Any,
    steps: Any,
    pulls: Any,
    radius: Any,
    buffers: Any,
) -> None:
    """Walk to the mean of directions, and write it times ``radius`` into ``result``, or as it is into ``means``.

    Whichever of ``result`` and ``means`` (float32) is not wanted is empty, and so are ``tangents``, those of the last
    step. ``like`` and ``stored`` are empty arrays of the element types that stand for the dtype that is rounded to and
    for that of the inputs. ``start`` holds the share of each direction (0: the mean starts as the first of them) and
    the norm of the first mean (0: none), ``pulls`` for each step and direction the projection and the strength (0:
    none). ``buffers`` are a row of ``TILE`` float32 for each input, one for the mean, and one for the tangent.
    """
    inputs = addresses.size
    share, first_norm = start[0], start[1]
    mean, tangent = buffers[inputs], buffers[inputs + 1]
    size = np.uint64(max(result.size, means.size))
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            mean[i] = _ZERO
            tangent[i] = _ZERO
        for k in range(inputs):
            address, norm, direction = addresses[k], norms[k], buffers[k]
            for i in range(count):
                direction[i] = rounded(loaded(address, first + i, stored) / norm, like)
            if share != _ZERO:
                for i in range(count):
                    mean[i] = rounded(mean[i] + rounded(direction[i] * share, like), like)
            elif k == 0:
                for i in range(count):
                    mean[i] = direction[i]
        if first_norm != _ZERO:
            for i in range(count):
                mean[i] = rounded(mean[i] / first_norm, like)
        for step in range(steps.shape[0]):
            tangent_norm, ahead, aside, mean_norm = steps[step, 0], steps[step, 1], steps[step, 2], steps[step, 3]
            for i in range(count):
                tangent[i] = _ZERO
            for k in range(inputs):
                projection, strength, direction = pulls[step, k, 0], pulls[step, k, 1], buffers[k]
                if strength != _ZERO:
                    for i in range(count):
                        beside = rounded(direction[i] - rounded(projection * mean[i], like), like)
                        tangent[i] = rounded(tangent[i] + rounded(strength * beside, like), like)
            if tangent_norm != _ZERO:
                for i in range(count):
                    moved = rounded(aside * rounded(tangent[i] / tangent_norm, like), like)
                    mean[i] = rounded(rounded(ahead * mean[i], like) + moved, like)
            if mean_norm != _ZERO:
                for i in range(count):
                    mean[i] = rounded(mean[i] / mean_norm, like)
        if result.size:
            for i in range(count):
                result[first + i] = narrowed(rounded(radius * mean[i], like), like)
        else:
            for i in range(count):
                means[first + i] = mean[i]
                tangents[first + i] = tangent[i]


def _signature(element: Any, stored: Any = None) -> Any:
    """Return the signature for the element types of what is rounded to and of the inputs, which may be the same."""
    values = types.Array(types.float32, 1, "C")
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(element, 1, "C"),
        types.Array(stored or element, 1, "C"),
        values,
        values,
        types.Array(types.uint64, 1, "C"),
        values,
        values,
        types.Array(types.float32, 2, "C"),
        types.Array(types.float32, 3, "C"),
        types.float32,
        types.Array(types.float32, 2, "C"),
    )


def _project(like: Any, stored: Any, mean: Any, addresses: Any, norms: Any, products: Any) -> None:
    """Fill a row of ``products`` (float64) for each direction: it times the ``mean`` (float32)."""
    size = np.uint64(mean.size)
    for k in range(addresses.size):
        address, norm, row = addresses[k], norms[k], products[k]
        for i in range(size):
            row[i] = np.float64(mean[i]) * np.float64(rounded(loaded(address, i, stored) / norm, like))


def _signature_of_projections(element: Any) -> Any:
    """Return the signature of ``_project`` for the element type that stands for the dtype."""
    values = types.Array(types.float32, 1, "C")
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint32, 1, "C"),
        values,
        types.Array(types.uint64, 1, "C"),
        values,
        types.Array(types.float64, 2, "C"),
    )


KERNEL: Final = Kernel(_karcher, _signature, for_statistics=True)
_PROJECTIONS: Final = Kernel(_project, _signature_of_projections)
KERNELS: Final = (KERNEL, _PROJECTIONS)


@dataclass(frozen=True, slots=True)
class Path:
    """The numbers of the way, as arrays that the kernel takes."""

    norms: NDArray[np.float32]
    start: NDArray[np.float32]
    steps: NDArray[np.float32]
    pulls: NDArray[np.float32]


def reached(dtype: DType, inputs: Sequence[Raw], path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the mean and the last tangent of ``inputs``, bytes of float32 that hold values of ``dtype``."""
    size = inputs[0].size // 4
    mean, tangent = (view(aligned_bytes(size * 4), F32).view(np.float32) for _ in range(2))
    _call(KERNEL.compiled(dtype, F32), empty(0, dtype), empty(0, dtype), empty(0, F32), mean, tangent, inputs, path, 0)
    return mean, tangent


def projections(dtype: DType, inputs: Sequence[Raw], path: Path) -> NDArray[np.float64]:
    """Return a row for each direction: it times the mean that is reached; ``inputs`` are as for ``reached``."""
    mean, _ = reached(dtype, inputs, path)
    products = np.empty((len(inputs), mean.size), dtype=np.float64)
    kernel = _PROJECTIONS.compiled(dtype)
    kernel(empty(0, dtype), empty(0, F32), mean, addresses(inputs), path.norms, products)
    return products


def merge(dtype: DType, inputs: Sequence[Raw], path: Path, radius: float) -> Raw:
    """Return the merged bytes of ``inputs``, bytes of ``dtype``."""
    result, nothing, none = empty_result(inputs[0], dtype), np.zeros(0, dtype=np.float32), empty(0, dtype)
    _call(KERNEL.compiled(dtype), result, none, none, nothing, nothing, inputs, path, radius)
    merged: Raw = result.view(np.uint8)
    return merged


def _call(
    kernel: Any,
    result: Any,
    like: Any,
    stored: Any,
    mean: Any,
    tangent: Any,
    inputs: Sequence[Raw],
    path: Path,
    radius: float,
) -> None:
    buffers = aligned_bytes((len(inputs) + 2) * TILE * 4).view(np.float32).reshape(-1, TILE)
    kernel(
        result,
        like,
        stored,
        mean,
        tangent,
        addresses(inputs),
        path.norms,
        path.start,
        path.steps,
        path.pulls,
        np.float32(radius),
        buffers,
    )
