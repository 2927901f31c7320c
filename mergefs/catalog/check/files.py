"""What must be true of the catalog as a whole: its format, its tables, and the files in its directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb
from blake3 import blake3

from mergefs.catalog.catalog import FORMAT, FORMAT_KEY
from mergefs.catalog.check.evidence import REMEDIES, Evidence, FileInvariant, Finding, Repair
from mergefs.catalog.directory import COMPACTING, PLANES, SALVAGE
from mergefs.catalog.environment import View
from mergefs.catalog.naming import name_of_key
from mergefs.catalog.schema import META, SCHEMA, TABLES

_PIECE: Final = 2**22
_MOVE_AWAY: Final = "use the mergefs that made it, or move the catalog away: everything in it can be rebuilt"


def _format(evidence: Evidence) -> Iterator[Finding]:
    stamp = evidence.view.get(META, FORMAT_KEY)
    if stamp is None and not any(evidence.view.count(table) for table in SCHEMA):
        return  # nobody has used it yet
    if stamp != str(FORMAT).encode():
        found = "none" if stamp is None else repr(stamp.decode(errors="replace"))
        yield Finding(
            "C1", META, FORMAT_KEY.hex(), "format", f"the format is {found} and not '{FORMAT}'", _MOVE_AWAY, Repair.NONE
        )


def _tables(evidence: Evidence) -> Iterator[Finding]:
    for name in evidence.view.names():
        if name not in TABLES:
            yield Finding("C2", name, "", name, "this version knows no table of that name", _MOVE_AWAY, Repair.NONE)


def _readable(evidence: Evidence) -> Iterator[Finding]:
    for table in SCHEMA:
        says = _unreadable(evidence.view, table)
        if says is not None:
            yield Finding("C3", table, "", table, says, REMEDIES[Repair.REBUILD], Repair.REBUILD)


def _unreadable(view: View, table: str) -> str | None:
    """Return in words why a table cannot be read as a whole, None where it can."""
    read = 0
    try:
        for key, value in view.items(table):
            if view.get(table, key) != value:
                return f"record {name_of_key(key)} is not found by its key"
            read += 1
    except lmdb.Error as error:
        return f"after {read} records the pages are damaged ({error})"
    counted = view.count(table)
    return None if read == counted else f"{read} records can be read, and the table counts {counted}"


def _leftovers(evidence: Evidence) -> Iterator[Finding]:
    for name in (COMPACTING, SALVAGE):
        path = evidence.path / name
        if path.exists():
            says = "an interrupted compaction or repair has left it"
            yield Finding("C4", "", "", str(path), says, REMEDIES[Repair.DELETE], Repair.DELETE)


def _hashes(evidence: Evidence) -> Iterator[Finding]:
    for path in sorted((evidence.path / PLANES).glob("*.planes")):
        try:
            found = _hash(path)
        except OSError as error:
            found = f"none, since it cannot be read ({error.strerror})"
        if found != path.stem:
            says = f"its bytes have the hash {found}, and not that of its name"
            yield Finding("C5", "", "", str(path), says, REMEDIES[Repair.DELETE], Repair.DELETE)


def _hash(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return str(hasher.hexdigest(length=16))


FILE_INVARIANTS: Final = (
    FileInvariant("C1", "the format stamp is this version's", _format),
    FileInvariant("C2", "it has no tables but those of this version", _tables),
    FileInvariant(
        "C3",
        "every table can be read in the order of its keys, as many records as it counts, each found by its key",
        _readable,
    ),
    FileInvariant("C4", "nothing is left of an interrupted compaction or repair", _leftovers),
    FileInvariant("C5", "each file of planes has the hash that is its name", _hashes),
)
