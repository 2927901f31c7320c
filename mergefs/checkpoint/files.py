"""Opening and reading the small files of a model directory, with errors meant for people."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergefs.errors import CheckpointError, SourceReadError


@contextmanager
def open_source(path: Path) -> Iterator[int]:
    """Open the regular file ``path`` for reading and yield its descriptor.

    The kernel is told not to read ahead, so that only what is asked for is read from the disk. Raises
    CheckpointError when the path is no regular file, SourceReadError when it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path} is not a regular file; put the file itself, or a link to it, there")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file ``path``.

    Raises CheckpointError when the file holds anything else, SourceReadError when it cannot be read.
    """
    with open_source(path) as descriptor:
        content = _read_all(descriptor, path)
    try:
        document = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no UTF-8 text at byte {error.start}; download this file again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); repair it or download this file again") from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(document).__name__}, but must hold an object; download this file again"
        )
    return document


def list_directory(path: Path) -> list[str]:
    """Return the names in the directory ``path``, sorted; SourceReadError when it cannot be listed."""
    try:
        return sorted(child.name for child in path.iterdir())
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_all(descriptor: int, path: Path) -> bytes:
    pieces: list[bytes] = []
    offset = 0
    try:
        while piece := os.pread(descriptor, 1 << 20, offset):
            pieces.append(piece)
            offset += len(piece)
    except OSError as error:
        raise _unreadable(path, error) from error
    return b"".join(pieces)


def _unreadable(path: Path, error: OSError | ValueError) -> SourceReadError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SourceReadError(f"{str(path)!r} cannot be read ({reason}); check that it exists and that you may read it")
