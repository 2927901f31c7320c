"""The catalog's typed interface. Keys are built here and nowhere else."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from mergefs.catalog.directory import PLANES
from mergefs.catalog.envelope import Envelope, UnsealedError, decode, enclose, today, unseal
from mergefs.catalog.environment import Environment, Put, View
from mergefs.catalog.naming import key_of_entry, name_of_key
from mergefs.catalog.records import (
    CheckpointRecord,
    ContentRecord,
    DeltaRecord,
    HistogramRecord,
    NormRecord,
    NumberRecord,
    PlanEntryRecord,
    PlanesRecord,
    PlanRecord,
    ReadingRecord,
    ThresholdRecord,
    TransactionRecord,
    TwinRecord,
    VectorRecord,
    VocabularyRecord,
)
from mergefs.catalog.schema import META, SCHEMA, TABLES
from mergefs.errors import CatalogError

FORMAT: Final = 2
"""2: every value is sealed and says when it was kept and what it is about; statistics of blocks have sketches."""
FORMAT_KEY: Final = b"format"

_OF_PLANS: Final = ("plans", "entries", "readings")
"""Tables whose keys begin with the id of a plan."""

RecordT = TypeVar("RecordT", bound=msgspec.Struct)


def default_location() -> Path:
    """Return the catalog directory that is used when none is named."""
    if named := os.environ.get("MERGEFS_CATALOG"):
        return Path(named)
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "mergefs" / "catalog"


@dataclass(frozen=True, slots=True)
class Kept:
    """A record with its key and its value, the day (since 1970) that it was kept on, and what it is about."""

    key: bytes
    value: bytes
    day: int
    about: bytes
    record: Any


class Catalog:
    """Statistics, plans and transactions by key. Safe to share between threads, and between processes."""

    def __init__(self, path: Path) -> None:
        self._environment = Environment.shared(path, TABLES)
        self._pending: dict[tuple[str, bytes], bytes] = {}
        self._being_written: dict[tuple[str, bytes], bytes] = {}
        self._pending_lock = threading.Lock()
        self._flushing = threading.Lock()
        self._digests: dict[bytes, bytes] = {}
        self._check_format()

    def _check_format(self) -> None:
        """Stamp a new catalog; refuse one of another format."""
        stamp = self._environment.get(META, FORMAT_KEY)
        if stamp is None:
            self._environment.write([(META, FORMAT_KEY, str(FORMAT).encode())])
        elif stamp != str(FORMAT).encode():
            path = self._environment.path
            self._environment.close()
            raise CatalogError(
                f"{path}: the catalog has format {stamp.decode(errors='replace')!r} and this mergefs knows format "
                f"'{FORMAT}'; use the mergefs that made it, name another directory with --catalog, or move it away: "
                "everything in it can be rebuilt"
            )

    @property
    def path(self) -> Path:
        """The directory of the catalog."""
        return self._environment.path

    def close(self) -> None:
        """Write what is pending and close."""
        self.flush()
        self._environment.close()

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- statistics ---------------------------------------------------------------------------------------------------

    def content(self, key: bytes) -> ContentRecord | None:
        """Return the hashes of the tensor with the local key ``key``."""
        return self._get("contents", key, ContentRecord)

    def content_digest(self, key: bytes) -> bytes | None:
        """Return the hash of the tensor with the local key ``key``; it is asked for by every look at a statistic."""
        known = self._digests.get(key)
        if known is None and (record := self.content(key)) is not None:
            known = self._digests[key] = record.digest
        return known

    def keep_content(self, key: bytes, record: ContentRecord, about: bytes = b"") -> None:
        """Keep the hashes of a tensor at the next flush."""
        self._keep("contents", key, record, about)
        self._digests.pop(key, None)

    def delta(self, key: bytes) -> DeltaRecord | None:
        """Return the block statistics of a delta."""
        return self._get("deltas", key, DeltaRecord)

    def keep_delta(self, key: bytes, record: DeltaRecord, about: bytes = b"") -> None:
        """Keep the block statistics of a delta at the next flush."""
        self._keep("deltas", key, record, about)

    def planes(self, key: bytes) -> PlanesRecord | None:
        """Return where the planes of a delta are kept."""
        return self._get("planes", key, PlanesRecord)

    def keep_planes(self, key: bytes, record: PlanesRecord, about: bytes = b"") -> None:
        """Keep where the planes of a delta are, at the next flush."""
        self._keep("planes", key, record, about)

    def norms(self, key: bytes) -> NormRecord | None:
        """Return the squared norms of the blocks of a tensor."""
        return self._get("norms", key, NormRecord)

    def keep_norms(self, key: bytes, record: NormRecord, about: bytes = b"") -> None:
        """Keep the squared norms of the blocks of a tensor at the next flush."""
        self._keep("norms", key, record, about)

    def twin(self, key: bytes) -> TwinRecord | None:
        """Return which content a tensor may have."""
        return self._get("twins", key, TwinRecord)

    def keep_twin(self, key: bytes, record: TwinRecord, about: bytes = b"") -> None:
        """Keep which content a tensor may have at the next flush."""
        self._keep("twins", key, record, about)

    def histogram(self, key: bytes) -> HistogramRecord | None:
        """Return the magnitude histogram of a delta."""
        return self._get("histograms", key, HistogramRecord)

    def keep_histogram(self, key: bytes, record: HistogramRecord, about: bytes = b"") -> None:
        """Keep a magnitude histogram at the next flush."""
        self._keep("histograms", key, record, about)

    def threshold(self, key: bytes) -> ThresholdRecord | None:
        """Return a threshold."""
        return self._get("thresholds", key, ThresholdRecord)

    def keep_threshold(self, key: bytes, record: ThresholdRecord, about: bytes = b"") -> None:
        """Keep a threshold at the next flush."""
        self._keep("thresholds", key, record, about)

    def number(self, key: bytes) -> float | None:
        """Return a statistic that is one number."""
        record = self._get("numbers", key, NumberRecord)
        return None if record is None else record.value

    def keep_number(self, key: bytes, value: float, about: bytes = b"") -> None:
        """Keep a statistic that is one number at the next flush."""
        self._keep("numbers", key, NumberRecord(value), about)

    def vocabulary(self, key: bytes) -> VocabularyRecord | None:
        """Return a merged vocabulary."""
        return self._get("vocabularies", key, VocabularyRecord)

    def keep_vocabulary(self, key: bytes, record: VocabularyRecord) -> None:
        """Keep a merged vocabulary at the next flush."""
        self._keep("vocabularies", key, record)

    def vector(self, key: bytes) -> VectorRecord | None:
        """Return a statistic that is several numbers."""
        return self._get("vectors", key, VectorRecord)

    def keep_vector(self, key: bytes, record: VectorRecord, about: bytes = b"") -> None:
        """Keep a statistic that is several numbers at the next flush."""
        self._keep("vectors", key, record, about)

    def flush(self) -> bool:
        """Write everything that waits to be kept, in one transaction, and return whether there was anything.

        Who looks it up here has found it before.
        """
        with self._flushing:
            with self._pending_lock:
                self._being_written, self._pending = self._pending, {}
            try:
                if self._being_written:
                    self._environment.write([(*where, value) for where, value in self._being_written.items()])
                return bool(self._being_written)
            finally:
                with self._pending_lock:
                    self._being_written = {}

    # -- checkpoints, plans, transactions -----------------------------------------------------------------------------

    def checkpoint(self, local_identity: str) -> CheckpointRecord | None:
        """Return what is known of the checkpoint with this local identity."""
        return self._get("checkpoints", local_identity.encode(), CheckpointRecord)

    def keep_checkpoint(self, local_identity: str, record: CheckpointRecord) -> None:
        """Write down at once that a checkpoint was seen, unless that is known of today."""
        key = local_identity.encode()
        value = self._environment.get("checkpoints", key)
        if value is not None:
            known = self._decode("checkpoints", key, value, CheckpointRecord)
            if known.record == record and known.day == today():
                return
        self._environment.write([("checkpoints", key, enclose("checkpoints", key, record))])

    def checkpoints(self) -> list[CheckpointRecord]:
        """Return every checkpoint."""
        return self._all("checkpoints", CheckpointRecord)

    def plan(self, plan_id: str) -> PlanRecord | None:
        """Return the plan with this id."""
        return self._get("plans", plan_id.encode(), PlanRecord)

    def plans(self) -> list[PlanRecord]:
        """Return every plan."""
        return self._all("plans", PlanRecord)

    def plan_entries(self, plan_id: str) -> list[PlanEntryRecord]:
        """Return the tensors of a plan in the order of their names."""
        return self._all("entries", PlanEntryRecord, plan_id.encode() + b"/")

    def keep_plan(self, record: PlanRecord, entries: Iterable[PlanEntryRecord]) -> None:
        """Write a plan with its tensors in one transaction."""
        key = record.plan_id.encode()
        puts: list[Put] = [("plans", key, enclose("plans", key, record))]
        for entry in entries:
            entry_key = key_of_entry(record.plan_id, entry.name)
            puts.append(("entries", entry_key, enclose("entries", entry_key, entry)))
        self._environment.write(puts)

    def reading(self, plan_id: str) -> ReadingRecord | None:
        """Return what was last read of a plan, None where nothing has been."""
        return self._get("readings", plan_id.encode(), ReadingRecord)

    def keep_reading(self, record: ReadingRecord) -> None:
        """Write at once what has been read of a plan, unless the plan has been removed meanwhile."""
        key = record.plan_id.encode()
        self._environment.write([("readings", key, enclose("readings", key, record))], given=("plans", key))

    def transactions(self) -> list[TransactionRecord]:
        """Return every transaction."""
        return self._all("transactions", TransactionRecord)

    def begin_transaction(self, record: TransactionRecord) -> bool:
        """Write at once a transaction that has not named its plan before, if that is there; return whether it is."""
        key = record.transaction_id.encode()
        value = enclose("transactions", key, record)
        self._environment.write([("transactions", key, value)], given=("plans", record.plan_id.encode()))
        return self._environment.get("transactions", key) == value

    def keep_transaction(self, record: TransactionRecord) -> None:
        """Write the state of a transaction at once."""
        key = record.transaction_id.encode()
        self._environment.write([("transactions", key, enclose("transactions", key, record))])

    # -- inspection ---------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Return the number of records in each table."""
        return {table: self._environment.count(table) for table in SCHEMA}

    def kept(self, table: str) -> list["Kept"]:
        """Return every record of a table, with what surrounds it."""
        found = []
        for key, value in self._environment.items(table):
            envelope = self._decode(table, key, value, SCHEMA[table].record)
            found.append(Kept(key, value, envelope.day, envelope.about, envelope.record))
        return found

    def space(self) -> dict[str, int]:
        """Return the bytes on disk by kind: each table, free pages, and files of planes."""
        sizes = self._environment.sizes()
        planes = self.path / PLANES
        files = sum(path.stat().st_blocks * 512 for path in planes.iterdir()) if planes.is_dir() else 0
        return sizes | {"plane files": files}

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def remove(self, records: Iterable[tuple[str, "Kept"]]) -> int:
        """Remove records (with their tables) that nobody has written anew meanwhile; return how many those were.

        A plan that a transaction has begun to write meanwhile stays, with all that belongs to it.
        """
        listed = list(records)
        ended = {kept.key for table, kept in listed if table == "transactions"}
        named: set[bytes] | None = None

        def keep(view: View, table: str, key: bytes) -> bool:
            nonlocal named
            if named is None:
                named = {
                    self._decode("transactions", at, value, TransactionRecord).record.plan_id.encode()
                    for at, value in view.items("transactions")
                    if at not in ended
                }
            return table in _OF_PLANS and key.partition(b"/")[0] in named

        return self._environment.remove([(table, kept.key, kept.value) for table, kept in listed], keep)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep other processes out, if none has the catalog open; lends whether that is so."""
        with self._environment.alone() as is_alone:
            yield is_alone

    def other_users(self) -> str:
        """Return the other processes that have the catalog open, as words."""
        return self._environment.other_users()

    def compact(self) -> None:
        """Copy the data without its free pages. Only while ``alone`` lends that this process is."""
        self._environment.compact()

    def size_on_disk(self) -> int:
        """Return the bytes that the catalog takes."""
        return self._environment.size_on_disk()

    def _keep(self, table: str, key: bytes, record: msgspec.Struct, about: bytes = b"") -> None:
        with self._pending_lock:
            self._pending[table, key] = enclose(table, key, record, about)

    def _get(self, table: str, key: bytes, kind: type[RecordT]) -> RecordT | None:
        with self._pending_lock:
            value = self._pending.get((table, key)) or self._being_written.get((table, key))
        if value is None:
            value = self._environment.get(table, key)
        return None if value is None else self._decode(table, key, value, kind).record

    def _all(self, table: str, kind: type[RecordT], prefix: bytes = b"") -> list[RecordT]:
        return [self._decode(table, key, value, kind).record for key, value in self._environment.items(table, prefix)]

    def _decode(self, table: str, key: bytes, value: bytes, kind: type[RecordT]) -> Envelope[RecordT]:
        try:
            return decode(unseal(table, key, value), kind)
        except (UnsealedError, msgspec.DecodeError) as error:
            raise CatalogError(
                f"{self._environment.path}: record {name_of_key(key)} of table {table!r} is damaged ({error}); "
                "`mergefs catalog check --repair` removes it, and what it held is gathered again when it is needed"
            ) from error
