"""Euclidean norms in float32, added up in the order that torch adds in.

On every CPU with vectors torch adds the squares of a vector's elements up in eight lanes by turns, then the lanes in
order, then the elements that are left over, whatever the number of threads. In float32 that is off by more the longer
the vector is: by a hundredth for an embedding of a hundred million elements. Where a merge is defined by such a norm,
mergekit's models are what they are because of it, so it is taken in the same order here.

Products are rounded before they are added, but for the last one to three that are left over: there torch's compiler
made fused multiply-adds. BF16 goes by sixteen elements, two for each lane; its squares are exact in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, DType

Single = NDArray[np.float32]
AddSquares: TypeAlias = Callable[[Single, Single], None]
"""Adds the squares of whole turns to the lanes."""

LANES: Final = 8
_ROUNDED_TOGETHER: Final = 4


def stride(dtype: DType) -> int:
    """Return how many elements of ``dtype`` are added to the lanes together."""
    return 2 * LANES if dtype == BF16 else LANES


@dataclass(frozen=True, slots=True)
class PartialNorm:
    """What has been added up of a vector: the lanes, and elements that are too few for another turn."""

    lanes: Single
    left: Single

    @classmethod
    def begin(cls) -> "PartialNorm":
        """Return the norm of nothing yet."""
        return cls(np.zeros(LANES, dtype=np.float32), np.zeros(0, dtype=np.float32))

    def add(self, values: Single, dtype: DType, compiled: AddSquares | None = None) -> "PartialNorm":
        """Return the norm with the next elements of the vector, which holds values of ``dtype``.

        ``compiled`` is a faster way to the same bits.
        """
        values = np.concatenate((self.left, values)) if self.left.size else values
        whole = values.size - values.size % stride(dtype)
        if compiled is not None:
            lanes = self.lanes.copy()
            compiled(lanes, values[:whole])
            return PartialNorm(lanes, values[whole:].copy())
        squares = (values[:whole] * values[:whole]).reshape(-1, LANES)
        # Along the first axis numpy adds one row after the other.
        lanes = np.add.reduce(np.concatenate((self.lanes[None, :], squares)), axis=0)
        return PartialNorm(lanes, values[whole:].copy())

    def finish(self) -> np.float32:
        """Return the norm."""
        norm: np.float32 = _finished(self.lanes[None, :], self.left[None, :])[0]
        return norm


def row_norms(rows: Single, dtype: DType) -> Single:
    """Return the norm of each row of a matrix of values of ``dtype``."""
    whole = rows.shape[1] - rows.shape[1] % stride(dtype)
    squares = (rows[:, :whole] * rows[:, :whole]).reshape(rows.shape[0], whole // LANES, LANES)
    return _finished(np.add.reduce(squares, axis=1), rows[:, whole:])


def _finished(lanes: Single, left: Single) -> Single:
    """Return the norms of some vectors, from their lanes and from the elements that are left over."""
    total = lanes[:, 0]
    for lane in range(1, LANES):
        total = total + lanes[:, lane]
    rounded = left.shape[1] - left.shape[1] % _ROUNDED_TOGETHER
    for index in range(left.shape[1]):
        values = left[:, index]
        if index < rounded:
            total = total + values * values
        else:
            total = (total.astype(np.float64) + values.astype(np.float64) ** 2).astype(np.float32)
    return np.sqrt(total)
