"""The catalog as a mount uses it: readers come before what is kept for later."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergefs.catalog import Catalog
from mergefs.catalog.records import CheckpointRecord, PlanEntryRecord, PlanRecord
from mergefs.errors import CatalogError

_LOG = logging.getLogger(__name__)


class ServingCatalog(Catalog):
    """A catalog that goes on without keeping anything when it cannot be written to, as on a full disk.

    Nothing that is served depends on what is kept: it would only have to be found out again. So once a mount is
    ``serving``, a failure is told once in the log, until statistics are kept again; before that, it is an error.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.serving = False
        self._told = False

    def flush(self) -> bool:
        """Write everything that waits to be kept, or let it go."""
        written = False
        with self._forgiving():
            written = super().flush()
            if written:  # and not by another thread, which may just have failed to
                self._told = False
        return written

    def keep_checkpoint(self, local_identity: str, record: CheckpointRecord) -> None:
        """Write down that a checkpoint was seen, or let it go."""
        with self._forgiving():
            super().keep_checkpoint(local_identity, record)

    def keep_plan(self, record: PlanRecord, entries: Iterable[PlanEntryRecord]) -> None:
        """Write a plan, or let it go."""
        with self._forgiving():
            super().keep_plan(record, entries)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Let a failure to write pass while there are readers."""
        try:
            yield
        except CatalogError as error:
            if not self.serving:
                raise
            if not self._told:
                _LOG.warning("what is found out is not kept: %s", error)
            self._told = True
