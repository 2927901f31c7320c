"""The rate-distortion bound of Gaussian rows: what no code of as many bits could do better on average.

A row (the last dimension) of a delta is taken as independent Gaussian numbers of mean zero and the row's own mean
square. To describe numbers of variance v with a mean squared error of D takes log2(v / D) / 2 bits for each (Shannon
1959); over rows of different variances the bits are best spent by reverse water-filling: every row is left with the
same error, the water level, but rows that lie below it, which get no bits and keep their variance as error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are described together: elements and mean square of each."""

    sizes: NDArray[np.float64]
    variances: NDArray[np.float64]

    @classmethod
    def of(cls, models: Sequence[Mapping[str, NDArray[np.float32]]]) -> "Rows":
        """Return the rows of all tensors of all ``models``; a vector is one row."""
        sizes: list[NDArray[np.float64]] = []
        variances: list[NDArray[np.float64]] = []
        for tensor in (tensor for model in models for tensor in model.values()):
            rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).astype(np.float64)
            variances.append(np.square(rows).mean(axis=1))
            sizes.append(np.full(rows.shape[0], float(rows.shape[1])))
        return cls(np.concatenate(sizes), np.concatenate(variances))


def least_squared_error(rows: Rows, bits: float) -> float:
    """Return the least expected squared error, over all rows, of a description of ``bits`` bits."""
    known = rows.variances > 0
    sizes, variances = rows.sizes[known], rows.variances[known]
    if not variances.size:
        return 0.0

    def bits_at(level: float) -> float:
        return float((sizes * np.maximum(np.log2(variances / level), 0.0)).sum() / 2)

    # The water level between one that costs more than there is, and the largest variance, which costs nothing.
    high = float(variances.max())
    low = high
    while bits_at(low) < bits:
        low /= 4.0
    for _ in range(100):
        level = math.sqrt(low * high)
        low, high = (level, high) if bits_at(level) > bits else (low, level)
    return float((sizes * np.minimum(variances, high)).sum())
