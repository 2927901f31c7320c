"""Runs a method's kernel over the bytes of one block."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.methods.contract import Block, Method, RawRun

_TILE: Final = 64 * 1024
"""Elements that a reference kernel works on at once: its intermediate arrays then stay in the CPU's cache."""


def run_kernel(
    method: Method[Any],
    coefficients: Any,
    inputs: tuple[tuple[Raw, DType], ...],
    compute: DType,
    out: DType,
    start: int,
    fused: bool = True,
) -> Raw:
    """Return the merged bytes, of dtype ``out``, of a run of elements that begins at flat index ``start``.

    ``inputs`` are the bytes of the same run in each model, with their dtypes. The method's fused kernel is taken where
    there is one and ``fused`` allows it, else the reference; the bytes are the same. The kernels are elementwise, so
    cutting the run into tiles changes nothing.
    """
    if fused and out == compute and all(dtype == compute for _, dtype in inputs):
        merged = method.fused(RawRun(tuple(raw for raw, _ in inputs), compute, start), coefficients)
        if merged is not None:
            return merged
    count = inputs[0][0].size // inputs[0][1].itemsize
    result: Raw = np.empty(count * out.itemsize, dtype=np.uint8)
    for first in range(0, count, _TILE):
        last = min(first + _TILE, count)
        tile = tuple((raw[first * dtype.itemsize : last * dtype.itemsize], dtype) for raw, dtype in inputs)
        result[first * out.itemsize : last * out.itemsize] = _run_tile(
            method, coefficients, tile, compute, out, start + first, fused
        )
    return result


def _run_tile(
    method: Method[Any],
    coefficients: Any,
    inputs: tuple[tuple[Raw, DType], ...],
    compute: DType,
    out: DType,
    start: int,
    fused: bool,
) -> Raw:
    """Return what ``run_kernel`` does, for a run that is worked on at once."""
    with np.errstate(all="ignore"):
        if fused:
            same = tuple(convert(raw, dtype, compute, compute) for raw, dtype in inputs)
            merged = method.fused(RawRun(same, compute, start), coefficients)
            if merged is not None:
                return convert(merged, compute, compute, out)
        values = tuple(load(raw, dtype, compute) for raw, dtype in inputs)
        return store(method.reference(Block(values, start), coefficients, Precision(compute)), compute, out)


def convert(raw: Raw, stored: DType, compute: DType, out: DType) -> Raw:
    """Return a block that no method touches, by way of the compute dtype as if one had."""
    if stored == compute == out:
        return raw
    with np.errstate(all="ignore"):
        return store(load(raw, stored, compute), compute, out)
