"""What was really read of a plan, kept in the catalog beside it for `mergefs explain`."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ReadingRecord
from mergefs.engine.engine import Engine
from mergefs.errors import CatalogError

_LOG = logging.getLogger(__name__)

How = Literal["mount", "materialize", "open"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The last reading of a plan: ``how``, when, and ``counts`` as in ``Tally.counts``."""

    how: str
    changed_ns: int
    counts: Mapping[str, NDArray[np.int64]]

    def first(self) -> Mapping[str, tuple[int, ...]]:
        """Return for each tensor the bytes that were read for the first time of each input, then of the stand-in."""
        return {name: tuple(map(int, counts[:, 0])) for name, counts in self.counts.items()}

    @property
    def again(self) -> int:
        """The bytes that were read again, since a cache had dropped what was made of them."""
        return int(sum(counts[:, 1].sum() for counts in self.counts.values()))


def keep_reading(engine: Engine, how: How, catalog: Catalog, plan_id: str | None = None) -> int:
    """Keep what ``engine`` has read so far in place of an earlier reading of its plan, and return how much that is.

    ``plan_id`` is given where the plan has got another id since the engine was made. Nothing is kept where nothing was
    read. A catalog that cannot be written to is told in the log and is no error: the reading itself went well.
    """
    counts = engine.tally.counts()
    total = int(sum(entry.sum() for entry in counts.values()))
    its_id = plan_id or engine.plan.plan_id
    if total:
        packed = {name: entry.astype("<i8").tobytes() for name, entry in counts.items()}
        try:
            catalog.keep_reading(ReadingRecord(its_id, how, time.time_ns(), packed))
        except CatalogError as error:
            _LOG.warning("what was read of plan %s is not kept: %s", its_id, error)
    return total


def last_reading(plan_id: str, catalog: Catalog) -> Reading | None:
    """Return the last reading of a plan, None where it has not been read."""
    record = catalog.reading(plan_id)
    if record is None:
        return None
    counts = {name: np.frombuffer(packed, dtype="<i8").reshape(-1, 2) for name, packed in record.counts.items()}
    return Reading(record.how, record.changed_ns, counts)
