"""Sums of quantities over whole tensors in float64, the same on every machine."""

import math
from collections.abc import Sequence

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Precision, load
from mergefs.methods.contract import Block, ElementSum
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader


def element_sums(
    wanted: Sequence[ElementSum], places: Sequence[Place], compute: DType, reader: SourceReader
) -> list[float]:
    """Return the sum of each wanted quantity, from one pass over the inputs that they look at.

    numpy's own sum is used and not BLAS, whose order of summation depends on the CPU and on the threads.
    """
    precision = Precision(compute)
    models = sorted({model for statistic in wanted for model in statistic.models})
    parts: list[list[float]] = [[] for _ in wanted]
    for start, stop in BlockGrid.of(places[models[0]].shape):
        values = {
            model: load(places[model].read(reader, start, stop, Purpose.ANALYSIS), places[model].dtype, compute)
            for model in models
        }
        for statistic, gathered in zip(wanted, parts, strict=True):
            with np.errstate(all="ignore"):
                terms = statistic.terms(Block(tuple(values[model] for model in statistic.models), start), precision)
                gathered.append(float(terms.astype(np.float64).sum()))
    # math.fsum refuses infinities of both signs; what they come to is not a number.
    return [math.fsum(part) if all(map(math.isfinite, part)) else float(np.sum(part)) for part in parts]
