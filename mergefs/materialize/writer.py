"""Writes the files of a merged model into a staging directory: whole, hashed, and synced to disk."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs.engine.ahead import in_order
from mergefs.engine.model_files import ModelFiles
from mergefs.errors import MaterializeError
from mergefs.materialize.manifest import FileEntry
from mergefs.progress import Progress

_CHUNK: Final = 8 * 2**20
_AHEAD: Final = 4
"""Chunks that are computed while earlier ones are written."""


def write_files(files: ModelFiles, directory: Path, progress: Progress) -> dict[str, FileEntry]:
    """Write every file of the model into ``directory`` and return sizes and hashes.

    Raises MaterializeError when the disk fails, and the errors of the engine.
    """
    entries: dict[str, FileEntry] = {}
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="merge") as pool:
        for name, size in files.sizes.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            entries[name] = write_file(path, _chunks(files, name, size, pool), progress)
    return entries


def write_file(path: Path, chunks: Iterator[bytes], progress: Progress) -> FileEntry:
    """Write one new file from ``chunks``, sync it, and return its size and hash. Permissions follow the umask."""
    hasher = blake3()
    size = 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                _write_all(descriptor, chunk)
                hasher.update(chunk)
                size += len(chunk)
                progress.advance(len(chunk))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MaterializeError(
            f"{path}: writing failed after {size} bytes ({error.strerror}); free space or choose another place, and "
            "run again: the destination is as it was"
        ) from error
    return FileEntry(size, hasher.hexdigest())


def _chunks(files: ModelFiles, name: str, size: int, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield a file in order, computing a few chunks ahead."""
    return in_order(pool, lambda offset: files.read(name, offset, _CHUNK), range(0, size, _CHUNK), _AHEAD)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``: the system may take less at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
