"""The journal of a model that is being written: which parts of it are on disk for good, and what they must be.

It lies in the staging directory. A part is written down once its file has been synced, and the journal is synced then:
so what the journal tells survives a loss of power. It is believed no further than the hashes go: each line has one of
its own, the first line that is not whole ends it, and a part is used again only if what lies there has its hash.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from mergefs.materialize.system import sync, write_all

_CHECK_BYTES: Final = 16


class Work(msgspec.Struct, frozen=True, tag="work"):
    """What is being written: parts of other work are of no use to it.

    ``layout`` is a hash of all sizes and headers, ``files`` one of what the inputs' files are (``files_identity``).
    """

    transaction_id: str
    plan_id: str
    mergefs_version: str
    layout: str
    total_bytes: int
    files: str = ""


class Part(msgspec.Struct, frozen=True, tag="part"):
    """A run of ``size`` bytes of a weight file that is on disk: a piece, or what a chunk has of one; hash in hex."""

    file: str
    offset: int
    size: int
    blake3: str


class Read(msgspec.Struct, frozen=True, tag="read"):
    """What a run had read when it wrote this down, bytes; a later line of the same run takes the place of this one."""

    run: int
    expert_bytes: int
    base_bytes: int


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Everything is on disk: the model has this manifest (its hash), and only the rename is to follow."""

    manifest: str


_Entry = Work | Part | Read | Prepared


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a journal tells. ``parts`` holds each finished part by file and offset, ``finished_bytes`` counts all."""

    work: Work
    parts: Mapping[str, Mapping[int, Part]]
    read: Mapping[int, Read]
    prepared: str | None
    finished_bytes: int
    valid_bytes: int


def read_journal(path: Path) -> Recorded | None:
    """Return what the journal at ``path`` tells, None where there is none or not even its first line is whole.

    Raises OSError.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    work: Work | None = None
    parts: dict[str, dict[int, Part]] = {}
    read: dict[int, Read] = {}
    prepared, valid = None, 0
    while (entry := _entry_at(data, valid)) is not None:
        if isinstance(entry, Work):
            work = entry
        elif isinstance(entry, Part):
            parts.setdefault(entry.file, {})[entry.offset] = entry
        elif isinstance(entry, Read):
            read[entry.run] = entry
        else:
            prepared = entry.manifest
        valid = data.index(b"\n", valid) + 1
    finished = sum(part.size for found in parts.values() for part in found.values())
    return None if work is None else Recorded(work, parts, read, prepared, finished, valid)


def _entry_at(data: bytes, start: int) -> _Entry | None:
    """Return the entry in the line that begins at ``start``, None unless it is whole."""
    end = data.find(b"\n", start)
    if end < 0:
        return None
    content, _, check = data[start:end].rpartition(b" ")
    if check != _check(content):
        return None
    try:
        entry: _Entry = msgspec.json.decode(content, type=_Entry)
    except msgspec.DecodeError:
        return None
    return entry


def _check(content: bytes) -> bytes:
    """Return what must stand at the end of a line."""
    return blake3(content).hexdigest(length=_CHECK_BYTES // 2).encode()


class Journal:
    """A journal that is written to. Use it from one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def begin(cls, path: Path, work: Work) -> "Journal":
        """Start a new journal. Raises OSError."""
        journal = cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666))
        try:
            journal.append([work])
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def go_on(cls, path: Path, recorded: Recorded) -> "Journal":
        """Go on with a journal behind what is whole of it. Raises OSError."""
        journal = cls(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC))
        try:
            os.ftruncate(journal._descriptor, recorded.valid_bytes)
            sync(journal._descriptor)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, entries: Iterable[_Entry]) -> None:
        """Write lines and make them durable. Raises OSError."""
        lines = [content + b" " + _check(content) + b"\n" for content in map(msgspec.json.encode, entries)]
        write_all(self._descriptor, b"".join(lines))
        sync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
