"""Means over the rows of whole tensors, the same on every machine."""

import math

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import load
from mergefs.sources.blocks import BLOCK_ELEMENTS
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader


def mean_row(place: Place, reader: SourceReader) -> NDArray[np.float64]:
    """Return the mean of all entries of the first dimension, flattened, in float64: they are summed in their order.

    torch sums them in float32, in an order that depends on the CPU's vectors and on the number of threads.
    """
    count, size = place.shape[0], math.prod(place.shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, size))
    total: NDArray[np.float64] = np.zeros(size, dtype=np.float64)
    with np.errstate(all="ignore"):
        for first in range(0, count, step):
            last = min(first + step, count)
            values = load(place.read(reader, first * size, last * size, Purpose.ANALYSIS), place.dtype, place.dtype)
            total += values.astype(np.float64).reshape(last - first, size).sum(axis=0)
        mean: NDArray[np.float64] = total / count
    return mean
