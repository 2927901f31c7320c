"""The files that a checkpoint is made of, and how a change of one is noticed."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType

from mergefs.checkpoint.header import ShardHeader

FileKey = NewType("FileKey", str)
"""Stands for one state of one file: its path and its fingerprint. Looked up for every block, so text, whose hash
Python keeps."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the file system says of a file: whoever writes to it or replaces it changes at least one of these.

    ``size`` in bytes, times in nanoseconds since 1970.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Fingerprint":
        """Return the fingerprint in ``status``, the result of ``os.stat`` or ``os.fstat``."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that bytes are read from, as it was when it was opened first; ``path`` is absolute."""

    path: Path
    fingerprint: Fingerprint
    key: FileKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        mark = self.fingerprint
        key = f"{mark.size} {mark.mtime_ns} {mark.ctime_ns} {mark.inode} {mark.device} {self.path}"
        object.__setattr__(self, "key", FileKey(key))


@dataclass(frozen=True, slots=True)
class Shard(SourceFile):
    """One safetensors file of a checkpoint."""

    header: ShardHeader


@dataclass(frozen=True, slots=True)
class AuxiliaryFile(SourceFile):
    """A file that belongs to the model beside its weights, such as its tokenizer.

    ``name`` is relative to the model directory and may contain ``/``.
    """

    name: str
