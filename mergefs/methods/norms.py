"""Norms as methods ask for them: in torch's order where that is fixed, else exactly.

torch's order is fixed in F32 and BF16. In F16 it depends on the number of threads, and in F64 it makes no difference;
there the squares are added up in float64 without an error.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import numpy as np

from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.kernels.norms import row_norms
from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import Answers, Block, ElementNorms, ElementSums, Moments

Norms: TypeAlias = ElementNorms | ElementSums


def ask_norms(
    compute: DType,
    name: str,
    models: tuple[int, ...],
    terms: Callable[[Block, Precision], Array],
    arguments: tuple[float, ...] = (),
    *,
    fused: Callable[[Block, Precision], Array] | None = None,
    moments: Moments | None = None,
    count: int,
    widened: bool = False,
    chunk: int | None = None,
) -> Norms:
    """Ask for the norms of the ``count`` rows of ``terms``.

    ``fused`` and ``moments`` are those of ``Quantity``, ``chunk`` is that of
    ``ElementNorms``. With ``widened`` torch has made float32 of them.
    """
    if compute in (BF16, F32) or (widened and compute == F16):
        return ElementNorms(
            name, models, terms, arguments, fused=fused, moments=moments, count=count, widened=widened, chunk=chunk
        )
    squared = None if moments is None else replace(moments, pairs=tuple((k, k) for k in range(count)), exact=True)
    compiled = None if fused is None else partial(_squares, terms=fused)
    squares = partial(_squares, terms=terms)
    return ElementSums(f"squares of {name}", models, squares, arguments, fused=compiled, moments=squared, count=count)


def _squares(block: Block, precision: Precision, terms: Callable[[Block, Precision], Array]) -> Array:
    values: Array = terms(block, precision).astype(np.float64) ** 2
    return values


def known_norms(answers: Answers, statistic: Norms) -> list[float]:
    """Return the norms, which are not rounded to the compute dtype."""
    numbers = [float(number) for number in answers.vector(statistic)]
    return numbers if isinstance(statistic, ElementNorms) else [math.sqrt(number) for number in numbers]


def norms_of_rows(rows: Array, precision: Precision) -> Array:
    """Return the norm of each row of a matrix of values of ``precision``, rounded to it."""
    if precision.dtype in (BF16, F32):
        return precision.round(row_norms(rows.astype(np.float32), precision.dtype))
    norms: Array = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    return precision.round(norms.astype(precision.carrier))
