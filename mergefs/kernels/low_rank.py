"""A weight and the product of two thin factors that is added to it, rounded as PEFT does on a CPU.

PEFT multiplies the factors in float32, or in float64 where the weight is. BLAS sums over the rank in the order of the
rank, by fused multiply-adds that begin at zero (up to ranks in the hundreds, where it cuts the sum in an order of the
machine's); that is the definition here, so results agree bit for bit and do not depend on the machine.
"""

from dataclasses import dataclass

import numpy as np

from mergefs.kernels.arithmetic import fused_multiply_add
from mergefs.kernels.precision import Array, Precision


@dataclass(frozen=True, slots=True)
class Product:
    """The rows of ``scaling * left @ right``: ``left`` is (rows, rank), ``right`` (rank, columns), in the carrier."""

    left: Array
    right: Array
    scaling: float


def add_product(weight: Array, product: Product, precision: Precision, rounds_delta: bool) -> Array:
    """Return ``weight + product``, (rows, columns) of values of ``precision``.

    With ``rounds_delta`` the product is rounded on its own before it is added.
    """
    delta = _delta(product, precision)
    return precision.round(weight + (precision.round(delta) if rounds_delta else delta))


def with_lengths(rows: Array, magnitude: Array) -> Array:
    """Return ``rows`` (rows, columns), each brought to the length that ``magnitude`` (rows) says, as DoRA does.

    Squares are summed up in float64, where PEFT sums in the type of ``rows`` and in an order of the CPU's.
    """
    squares = rows.astype(np.float64) ** 2
    lengths = np.sqrt(squares.sum(axis=1)).astype(rows.dtype)
    scaled: Array = (magnitude / lengths)[:, np.newaxis] * rows
    return scaled


def _delta(product: Product, precision: Precision) -> Array:
    """Return the scaled product in the carrier."""
    rows, rank = product.left.shape
    total: Array = np.zeros((rows, product.right.shape[1]), dtype=precision.carrier)
    for k in range(rank):
        total = fused_multiply_add(product.right[k], product.left[:, k, np.newaxis], total)
    scaled: Array = total * precision.carrier(product.scaling)
    return scaled
