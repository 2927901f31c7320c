"""What a check looks at: one state of the whole catalog, and what it found there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

import msgspec

from mergefs.catalog.envelope import UnsealedError, decode, unseal
from mergefs.catalog.environment import View
from mergefs.catalog.schema import SCHEMA


class Repair(Enum):
    """What ``--repair`` does about a finding."""

    REMOVE = "remove"
    """Remove the record: what it held can be had again."""
    FORGET = "forget"
    """Remove the record, with ``--forget`` only: nothing else knows what it held."""
    REBUILD = "rebuild"
    """Copy the records that can be read into a new file."""
    DELETE = "delete"
    """Delete a file or a directory in the catalog's."""
    NONE = "none"
    """Nothing: what must be done is for a person to decide."""


class Finding(msgspec.Struct, frozen=True):
    """One violation: the invariant's number, the record or the file, what is wrong, and what to do about it.

    ``key`` is in hexadecimal digits; ``name`` names the record or the file for people. ``value`` is what the key has,
    so that nothing else is removed.
    """

    number: str
    table: str
    key: str
    name: str
    says: str
    remedy: str
    repair: Repair
    value: bytes = b""


class Report(msgspec.Struct, frozen=True):
    """What a check found. ``records`` are those that were looked at, by table; ``repaired`` is what is well again."""

    path: str
    records: dict[str, int]
    findings: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()


REMEDIES: Final = {
    Repair.REMOVE: "`mergefs catalog check --repair` removes it, and {again}",
    Repair.FORGET: "`mergefs catalog check --repair --forget` removes it, and what it held is lost",
    Repair.REBUILD: "`mergefs catalog check --repair` keeps the records that can be read, and the others are gathered "
    "again when they are needed",
    Repair.DELETE: "`mergefs catalog check --repair` deletes it",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """One state of the catalog: nothing that others write meanwhile shows in it."""

    path: Path
    view: View
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    """Of the contents that were looked at: a hash of the hashes of blocks, by digest."""

    def has(self, table: str, key: bytes) -> bool:
        """Return whether there is a record, whatever its state."""
        return self.view.get(table, key) is not None

    def record(self, table: str, key: bytes) -> Any | None:
        """Return a record, None where there is none that can be read."""
        value = self.view.get(table, key)
        if value is None:
            return None
        try:
            return decode(unseal(table, key, value), SCHEMA[table].record).record
        except (UnsealedError, msgspec.DecodeError):
            return None

    def first_key(self, table: str, prefix: bytes) -> bytes | None:
        """Return the first key that begins with ``prefix``."""
        return next((key for key, _ in self.view.items(table, prefix)), None)


@dataclass(frozen=True, slots=True)
class Subject:
    """One record that is checked, and the catalog around it."""

    key: bytes
    record: Any
    day: int
    about: bytes
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Invariant:
    """What must be true of every record of ``table``; ``broken`` says in words how one breaks it, or returns None."""

    number: str
    table: str
    states: str
    broken: Callable[[Subject], str | None]


@dataclass(frozen=True, slots=True)
class ValueInvariant:
    """What must be true of the bytes of every record of every table, before anything else is asked of it."""

    number: str
    states: str
    broken: Callable[[str, bytes, bytes], str | None]


@dataclass(frozen=True, slots=True)
class FileInvariant:
    """What must be true of the catalog as a whole; ``find`` yields what is wrong."""

    number: str
    states: str
    find: Callable[[Evidence], Iterator[Finding]]
