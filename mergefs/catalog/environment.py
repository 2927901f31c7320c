"""An LMDB environment whose map grows by itself.

LMDB lets a map grow only while the process has no transaction open, so transactions are counted, and the one that
found the map full waits for the others. Readers never wait for a writer.

LMDB maps its files, and a mapped page that no disk block stands behind kills the process when it is touched. So the
lock file gets its blocks before LMDB maps it, and a data file that is shorter than its pages say is refused.
"""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from mergefs.errors import CatalogError

_INITIAL_MAP = 256 * 2**20
_LARGEST_MAP = 2**40
_LOCK_FILE_SIZE = 128 * 2**10
"""Above the 64 bytes that each of 1,024 readers takes, and the same in every process."""
_EXTENDING_DEADLINE = 1.0
"""Seconds within which another process has extended its file after a commit."""

Put = tuple[str, bytes, bytes | None]
"""A table, a key, and the value to keep there (None removes the key)."""


class Environment:
    """The tables of one catalog directory. Open it after forking, never before."""

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._path = path
        self._condition = threading.Condition()
        self._active = 0
        self._growers = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            _allocate(path / "lock.mdb", _LOCK_FILE_SIZE)
            self._lmdb: Any = lmdb.open(
                str(path), map_size=_INITIAL_MAP, max_dbs=len(tables), max_readers=1024, create=True
            )
            self._refuse_truncated()
            self._lmdb.reader_check()
            self._tables = {name: self._lmdb.open_db(name.encode()) for name in tables}
        except (lmdb.Error, OSError) as error:
            raise self._explain("opened", error) from error

    @property
    def path(self) -> Path:
        """The directory of the environment."""
        return self._path

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None."""
        with self._transaction(write=False) as transaction:
            value: bytes | None = transaction.get(key, db=self._tables[table])
            return value

    def items(self, table: str, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        """Return all pairs whose key starts with ``prefix``, in the order of the keys."""
        found: list[tuple[bytes, bytes]] = []
        with self._transaction(write=False) as transaction, transaction.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(prefix):
                return found
            for key, value in cursor:
                if not key.startswith(prefix):
                    break
                found.append((key, value))
        return found

    def count(self, table: str) -> int:
        """Return the number of keys in ``table``."""
        with self._transaction(write=False) as transaction:
            return int(transaction.stat(self._tables[table])["entries"])

    def size_on_disk(self) -> int:
        """Return the bytes of the pages in use."""
        with self._transaction(write=False):
            return self._file_sizes()[1]

    def write(self, puts: Sequence[Put]) -> None:
        """Apply ``puts`` in one durable transaction: all of them or none."""
        while True:
            announced = False
            try:
                with self._transaction(write=True) as transaction:
                    try:
                        self._apply(puts, transaction)
                    except lmdb.MapFullError:
                        # Before the transaction is given up: giving up waits for readers, who never stop coming.
                        self._announce_growth()
                        announced = True
                        raise
                break
            except lmdb.MapFullError:
                if not announced:
                    self._announce_growth()
                self._grow(double=True)
        self._extend()

    def _apply(self, puts: Sequence[Put], transaction: Any) -> None:
        """Put and delete within a transaction."""
        for table, key, value in puts:
            if value is None:
                transaction.delete(key, db=self._tables[table])
            else:
                transaction.put(key, value, db=self._tables[table])

    def close(self) -> None:
        """Close the environment."""
        self._lmdb.close()

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Any]:
        """Lend a transaction, once the map has the size that it has on disk."""
        try:
            transaction = self._begin(write)
            try:
                with transaction:
                    yield transaction
            finally:
                self._leave()
        except (lmdb.MapFullError, CatalogError):
            raise
        except lmdb.Error as error:
            raise self._explain("used", error) from error

    def _begin(self, write: bool) -> Any:
        """Begin a transaction; where another process has grown the map, follow it first."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._growers == 0)
                self._active += 1
            try:
                return self._lmdb.begin(write=write)
            except lmdb.MapResizedError:
                self._leave()
                self._announce_growth()
                self._grow(double=False)
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        """Count a transaction that has ended."""
        with self._condition:
            self._active -= 1
            self._condition.notify_all()

    def _announce_growth(self) -> None:
        """Let no transaction begin until ``_grow``, which must follow, is done."""
        with self._condition:
            self._growers += 1

    def _grow(self, double: bool) -> None:
        """Double the map, or take over the size that another process gave it."""
        with self._condition:
            self._condition.wait_for(lambda: self._active == 0)
            try:
                size = int(self._lmdb.info()["map_size"]) * 2
                if double and size > _LARGEST_MAP:
                    raise CatalogError(
                        f"{self._path}: the catalog has outgrown {_LARGEST_MAP} bytes; start another one"
                    )
                self._lmdb.set_mapsize(size if double else 0)
            finally:
                self._growers -= 1
                self._condition.notify_all()

    def _file_sizes(self) -> tuple[int, int]:
        """Return the bytes of the data file, and those that it must have to hold its last page.

        Only while no other thread can grow the map: both are read from it.
        """
        needed = (int(self._lmdb.info()["last_pgno"]) + 1) * int(self._lmdb.stat()["psize"])
        return (self._path / "data.mdb").stat().st_size, needed

    def _extend(self) -> None:
        """Give the data file the size that its pages say.

        LMDB leaves out pages at its end that a transaction took and gave back; without them, a file that somebody cut
        off would look the same.
        """
        with self._transaction(write=False):
            size, needed = self._file_sizes()
        if size < needed:
            _allocate(self._path / "data.mdb", needed)

    def _refuse_truncated(self) -> None:
        """Raise CatalogError when the data file has been cut off."""
        deadline = time.monotonic() + _EXTENDING_DEADLINE
        while True:
            size, needed = self._file_sizes()
            if size >= needed:
                return
            if time.monotonic() > deadline:
                self._lmdb.close()
                raise self._explain("opened", lmdb.CorruptedError(f"data.mdb has {size} bytes and needs {needed}"))
            time.sleep(0.02)  # another process may be extending it, which nothing announces

    def _explain(self, verb: str, error: Exception) -> CatalogError:
        """Return a sentence for an error of LMDB or of the file system."""
        number = getattr(error, "errno", None)
        remedy = (
            "free some space, or name another directory with --catalog"
            if number == errno.ENOSPC or isinstance(error, lmdb.DiskError)
            else "make it writable, or name another directory with --catalog"
            if isinstance(error, (OSError, lmdb.ReadonlyError))
            else "everything in it can be rebuilt: move it away, or name another directory with --catalog"
        )
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return CatalogError(f"{self._path}: the catalog cannot be {verb} ({reason}); {remedy}")


def _allocate(path: Path, size: int) -> None:
    """Make a file ``size`` bytes long, with disk blocks for all of them; one that is longer stays as it is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
