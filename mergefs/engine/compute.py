"""Runs a method's kernel over the bytes of one block."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels import precision as reference
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.methods.contract import Block, Method, RawRun

_TILE: Final = 64 * 1024
"""Elements that a reference kernel works on at once: its intermediate arrays then stay in the CPU's cache."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The arguments of ``run_kernel``."""

    method: Method[Any]
    coefficients: Any
    inputs: tuple[tuple[Raw, DType], ...]
    compute: DType
    out: DType
    start: int

    @property
    def count(self) -> int:
        """The number of elements."""
        raw, dtype = self.inputs[0]
        return raw.size // dtype.itemsize


def run_kernel(
    method: Method[Any],
    coefficients: Any,
    inputs: tuple[tuple[Raw, DType], ...],
    compute: DType,
    out: DType,
    start: int,
    fused: bool = True,
    into: Raw | None = None,
) -> Raw:
    """Return the merged bytes, of dtype ``out``, of a run of elements that begins at flat index ``start``.

    ``inputs`` are the bytes of the same run in each model, with their dtypes. The method's fused kernel is taken where
    there is one and ``fused`` allows it, else the reference; the bytes are the same, but for the payload of NaN. They
    may lie in ``into`` then, if that is given.
    """
    merged: Raw | None = None
    # What is too large for a dtype becomes infinite there: who asks for the bytes looks at them.
    with np.errstate(all="ignore"):
        if fused and out == compute and all(dtype == compute for _, dtype in inputs):
            merged = method.fused(RawRun(tuple(raw for raw, _ in inputs), compute, start, into), coefficients)
        elif fused and compute in FUSED_DTYPES and (out == compute or method.result_dtype(compute) == compute):
            merged = _run_converted(_Run(method, coefficients, inputs, compute, out, start))
        if merged is None:
            merged = _run_reference(_Run(method, coefficients, inputs, compute, out, start), fused)
        return merged


def _whole_grains(run: _Run) -> int:
    """Return how many elements a tile has: so many whole grains as fit, and at least one."""
    grain = run.method.grain(run.coefficients)
    return max(1, _TILE // grain) * grain


def _run_converted(run: _Run) -> Raw | None:
    """Return what the method's fused kernel makes of inputs that are converted tile by tile; None if it has none."""
    count, compute, out = run.count, run.compute, run.out
    step = _whole_grains(run)
    result: Raw = np.empty(count * out.itemsize, dtype=np.uint8)
    # The same memory for every tile: fresh pages would cost more than the merge.
    buffers: Raw = np.empty((len(run.inputs), min(count, step) * compute.itemsize), dtype=np.uint8)
    for first in range(0, count, step):
        last = min(first + step, count)
        tiles = tuple(
            change_dtype(raw[first * dtype.itemsize : last * dtype.itemsize], dtype, compute, buffer)
            for (raw, dtype), buffer in zip(run.inputs, buffers, strict=True)
        )
        merged = run.method.fused(RawRun(tiles, compute, run.start + first), run.coefficients)
        if merged is None:
            return None
        result[first * out.itemsize : last * out.itemsize] = change_dtype(merged, compute, out)
    return result


def _run_reference(run: _Run, compiled: bool) -> Raw:
    """Return what ``run_kernel`` does, by the formula, in tiles of whole grains: so cutting the run changes nothing.

    With ``compiled`` values are loaded, rounded and stored by compiled loops, to the same bits.
    """
    precision, load_values, store_values = Precision(run.compute), load, store
    if compiled and run.compute in FUSED_DTYPES:
        from mergefs.kernels.fused import arrays

        precision, load_values, store_values = arrays.precision_of(run.compute), arrays.load, arrays.store
    step = _whole_grains(run)
    count, compute, out = run.count, run.compute, run.out
    result: Raw = np.empty(count * out.itemsize, dtype=np.uint8)
    for first in range(0, count, step):
        last = min(first + step, count)
        tiles = ((raw[first * dtype.itemsize : last * dtype.itemsize], dtype) for raw, dtype in run.inputs)
        values = tuple(load_values(raw, dtype, compute) for raw, dtype in tiles)
        merged = run.method.reference(Block(values, run.start + first), run.coefficients, precision)
        result[first * out.itemsize : last * out.itemsize] = store_values(merged, run.method.result_dtype(compute), out)
    return result


def is_finite(raw: Raw, dtype: DType) -> bool:
    """Return whether ``raw`` holds neither NaN nor infinity."""
    if dtype in FUSED_DTYPES:
        from mergefs.kernels.fused.finite import is_finite as is_finite_compiled

        return is_finite_compiled(raw, dtype)
    return reference.is_finite(raw, dtype)


def convert(raw: Raw, stored: DType, compute: DType, out: DType) -> Raw:
    """Return a block that no method touches, by way of the compute dtype as if one had."""
    return change_dtype(change_dtype(raw, stored, compute), compute, out)


def change_dtype(raw: Raw, stored: DType, wanted: DType, buffer: Raw | None = None) -> Raw:
    """Return elements rounded to ``wanted``, in ``buffer`` or memory of their own; ``raw`` itself where it is that."""
    if stored == wanted:
        return raw
    if stored in FUSED_DTYPES and wanted in FUSED_DTYPES:
        from mergefs.kernels.fused.conversion import convert as convert_fused

        return convert_fused(raw, stored, wanted, buffer)
    with np.errstate(all="ignore"):
        return store(load(raw, stored, wanted), wanted, wanted)
