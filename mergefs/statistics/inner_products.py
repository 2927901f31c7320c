"""Inner products of whole tensors in float64, the same on every machine."""

import math

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import load
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader
from mergefs.statistics.pair import Location


def inner_product(first: Location, second: Location, compute: DType, reader: SourceReader) -> float:
    """Return the inner product of two tensors, taken in ``compute`` and summed in float64.

    numpy's own sum is used and not BLAS, whose order of summation depends on the CPU and on the threads.
    """
    parts: list[float] = []
    for start, stop in BlockGrid.of(first.tensor.shape):
        values = [
            load(place.read(reader, start, stop, Purpose.ANALYSIS), place.tensor.dtype, compute).astype(np.float64)
            for place in ((first,) if first == second else (first, second))
        ]
        parts.append(float((values[0] * values[-1]).sum()))
    return math.fsum(parts)
