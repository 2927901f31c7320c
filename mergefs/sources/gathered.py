"""An embedding whose rows are gathered from the embeddings of several models."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

ZERO: Final = -1
AVERAGE: Final = -2
"""What ``RowTable.part`` says of rows that no single part has."""


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """Where each row of a gathered tensor comes from.

    ``part`` (int16) is the index of the part that has the row, ZERO, or AVERAGE; ``row`` (int64) the number of the row
    there, or of the line of ``averages``. A line of ``averages`` (int64, one column for each part) names the rows that
    are averaged, -1 where a part has none.
    """

    part: NDArray[np.int16]
    row: NDArray[np.int64]
    averages: NDArray[np.int64]
