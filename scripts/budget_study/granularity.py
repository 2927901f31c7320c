"""What finer pieces than blocks would bring: the error that is left when the largest rows are bought one by one."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

BYTES_PER_ELEMENT: Final = 2
"""Of the families' BF16 weights."""


def error_of_largest_rows(contributions: Sequence[Mapping[str, NDArray[np.float32]]], budget: int) -> float:
    """Return the norm of what is missing when ``budget`` bytes buy the rows with the largest mean squares.

    ``contributions`` are what each expert adds to the merge; a row is a run of the last dimension, a vector is one row.
    """
    rows = [
        (index, name, number, float(square), BYTES_PER_ELEMENT * tensor.shape[-1])
        for index, tensors in enumerate(contributions)
        for name, tensor in tensors.items()
        for number, square in enumerate(np.square(_rows(tensor)).mean(axis=1))
    ]
    left = [{name: _rows(tensor).copy() for name, tensor in tensors.items()} for tensors in contributions]
    for index, name, number, _, cost in sorted(rows, key=lambda row: -row[3]):
        if cost <= budget:
            budget -= cost
            left[index][name][number] = 0.0
    squares = (np.square(sum(tensors[name] for tensors in left)).sum() for name in contributions[0])
    return math.sqrt(sum(map(float, squares)))


def _rows(tensor: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return a tensor as a matrix of its rows."""
    return tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
