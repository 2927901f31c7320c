"""A catalog with a sound record in every table, and hands that change single records of it."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from blake3 import blake3

from mergefs.catalog.catalog import FORMAT, FORMAT_KEY
from mergefs.catalog.envelope import decode, enclose, seal, unseal
from mergefs.catalog.environment import Environment
from mergefs.catalog.naming import key_of_entry
from mergefs.catalog.records import (
    CheckpointRecord,
    ContentRecord,
    DeltaRecord,
    HistogramRecord,
    InputRecord,
    NormRecord,
    NumberRecord,
    PlanEntryRecord,
    PlanesRecord,
    PlanRecord,
    ReadingRecord,
    SelectionRecord,
    ThresholdRecord,
    TransactionRecord,
    TwinRecord,
    VectorRecord,
    VocabularyRecord,
)
from mergefs.catalog.schema import META, SCHEMA, TABLES

LOCAL: Final = f"local-{'ab' * 32}"
PLAN: Final = "12" * 16
TRANSACTION: Final = "34" * 16
ENTRY: Final = key_of_entry(PLAN, "model.norm.weight")
KEY: Final = bytes(range(24))
PLANES_BYTES: Final = b"coded"
PLANES_NAME: Final = blake3(PLANES_BYTES).hexdigest(length=16)
_BLOCK: Final = blake3(b"block").digest()

RECORDS: Final[dict[str, tuple[bytes, msgspec.Struct]]] = {
    "checkpoints": (LOCAL.encode(), CheckpointRecord("/models/base", 3, 100, "cd" * 24)),
    "contents": (KEY, ContentRecord(_BLOCK[:24], _BLOCK)),
    "deltas": (
        KEY,
        DeltaRecord(
            blocks=2,
            present=b"\x40",
            changed=struct.pack("<I", 7),
            squared_norms=struct.pack("<f", 2.5),
            absolute_sums=struct.pack("<f", 3.0),
            largest=struct.pack("<f", 1.0),
            sketch_scales=struct.pack("<f", 0.1),
            sketches=bytes(128),
        ),
    ),
    "norms": (KEY, NormRecord(struct.pack("<2f", 1.0, 0.0))),
    "twins": (KEY, TwinRecord(KEY)),
    "planes": (
        KEY,
        PlanesRecord(
            planes=1,
            cell=8,
            group=4,
            coded=struct.pack("<2I", 8, 0),
            left=struct.pack("<4f", 2.0, 0.0, 1.0, 0.0),
            digest=bytes(16),
            file=f"{PLANES_NAME}.planes",
            file_size=len(PLANES_BYTES),
            mtime_ns=1_700_000_000_000_000_000,
            offset=0,
        ),
    ),
    "histograms": (KEY, HistogramRecord(zlib.compress(bytes([2, 3, 0x85, 0x07, 5, 1])))),
    "thresholds": (KEY, ThresholdRecord(2**31 - 1, 2**40)),
    "numbers": (KEY, NumberRecord(float("nan"))),
    "vectors": (KEY, VectorRecord(struct.pack("<2d", 1.0, 2.0))),
    "vocabularies": (
        bytes(32),
        VocabularyRecord(
            ids=struct.pack("<3i", 0, 1, 3),
            count=3,
            token_ids=(3,),
            found_ids=(-1,),
            permutations=(struct.pack("<4i", 0, 1, -1, 2),),
            files={"tokenizer.json": b"{}"},
            notes=(),
        ),
    ),
    "plans": (
        PLAN.encode(),
        PlanRecord(
            plan_id=PLAN,
            recipe="merge_method: linear\n",
            origin="/recipes/linear.yml",
            method="linear",
            budget_bytes=50,
            expert_bytes_total=100,
            expert_bytes_planned=50,
            random_seed=0,
            max_shard_size=5 * 10**9,
            inputs=(InputRecord("org/model", "/models/base", "expert", "cd" * 24, LOCAL),),
            created_ns=1_700_000_000_000_000_000,
        ),
    ),
    "entries": (
        ENTRY,
        PlanEntryRecord(
            "model.norm.weight",
            "BF16",
            (8,),
            SelectionRecord(8, (zlib.compress(b"\xff"),), zlib.compress(np.zeros(1, dtype="<i2").tobytes()), b"\x80"),
        ),
    ),
    "readings": (PLAN.encode(), ReadingRecord(PLAN, "mount", 1, {"model.norm.weight": struct.pack("<4q", 8, 0, 0, 0)})),
    "transactions": (
        TRANSACTION.encode(),
        TransactionRecord(TRANSACTION, PLAN, "/out", "/.out", "committed", 7, 1, "ef" * 32),
    ),
}
"""By table: a key and the record there."""


class Hands:
    """Changes records of a catalog that no process has open, whatever the invariants say."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def planes(self) -> Path:
        """The file of planes."""
        return self.path / "planes" / f"{PLANES_NAME}.planes"

    def fill(self) -> None:
        """Put a sound record into every table."""
        puts = [(table, key, enclose(table, key, record)) for table, (key, record) in RECORDS.items()]
        self.write((META, FORMAT_KEY, str(FORMAT).encode()), *puts)
        self.planes.parent.mkdir()
        self.planes.write_bytes(PLANES_BYTES)
        os.utime(self.planes, ns=(1_700_000_000_000_000_000, 1_700_000_000_000_000_000))

    def write(self, *puts: tuple[str, bytes, bytes | None], tables: tuple[str, ...] = TABLES) -> None:
        """Write values as they are."""
        environment = Environment(self.path, tables)
        environment.write(puts)
        environment.close()

    def value(self, table: str) -> bytes:
        """Return the value of the record of a table."""
        environment = Environment(self.path, TABLES)
        value = environment.get(table, RECORDS[table][0])
        environment.close()
        assert value is not None
        return value

    def keep(self, table: str, record: msgspec.Struct, key: bytes | None = None, **envelope: Any) -> None:
        """Keep a record under the key of the one that its table has, or under another."""
        at = RECORDS[table][0] if key is None else key
        self.write((table, at, enclose(table, at, record, **envelope)))

    def change(self, table: str, **fields: Any) -> None:
        """Change fields of the record of a table."""
        key, _ = RECORDS[table]
        record = decode(unseal(table, key, self.value(table)), SCHEMA[table].record).record
        self.keep(table, msgspec.structs.replace(record, **fields))

    def move(self, table: str, key: bytes) -> None:
        """Keep the record of a table under another key, and not under its own."""
        old, record = RECORDS[table]
        self.write((table, old, None), (table, key, enclose(table, key, record)))

    def remove(self, table: str) -> None:
        """Remove the record of a table."""
        self.write((table, RECORDS[table][0], None))

    def seal_payload(self, table: str, payload: bytes) -> None:
        """Put bytes that are no envelope under the key of the record of a table, with the right seal."""
        key = RECORDS[table][0]
        self.write((table, key, seal(table, key, payload) + payload))
