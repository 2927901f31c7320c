"""An LMDB environment whose map grows by itself.

LMDB lets a map grow only while the process has no transaction open, so transactions are counted, and the one that
found the map full waits for the others. Readers never wait for a writer.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from mergefs.errors import CatalogError

_INITIAL_MAP = 256 * 2**20
_LARGEST_MAP = 2**40

Put = tuple[str, bytes, bytes | None]
"""A table, a key, and the value to keep there (None removes the key)."""


class Environment:
    """The tables of one catalog directory. Open it after forking, never before."""

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._path = path
        self._condition = threading.Condition()
        self._active = 0
        self._growing = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lmdb: Any = lmdb.open(
                str(path), map_size=_INITIAL_MAP, max_dbs=len(tables), max_readers=1024, create=True
            )
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
        info, stat = self._lmdb.info(), self._lmdb.stat()
        return int((info["last_pgno"] + 1) * stat["psize"])

    def write(self, puts: Sequence[Put]) -> None:
        """Apply ``puts`` in one durable transaction: all of them or none."""
        while True:
            try:
                with self._transaction(write=True) as transaction:
                    for table, key, value in puts:
                        if value is None:
                            transaction.delete(key, db=self._tables[table])
                        else:
                            transaction.put(key, value, db=self._tables[table])
                return
            except lmdb.MapFullError:
                self._grow(double=True)

    def close(self) -> None:
        """Close the environment."""
        self._lmdb.close()

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Any]:
        """Begin a transaction, once the map has the size that it has on disk."""
        with self._condition:
            self._condition.wait_for(lambda: not self._growing)
            self._active += 1
        try:
            yield from self._begin(write)
        except (lmdb.MapFullError, CatalogError):
            raise
        except lmdb.Error as error:
            raise self._explain("used", error) from error
        finally:
            with self._condition:
                self._active -= 1
                self._condition.notify_all()

    def _begin(self, write: bool) -> Iterator[Any]:
        """Yield one transaction; where another process has grown the map, follow it first."""
        try:
            transaction = self._lmdb.begin(write=write)
        except lmdb.MapResizedError:
            with self._condition:
                self._active -= 1
            try:
                self._grow(double=False)
            finally:
                with self._condition:
                    self._active += 1
            transaction = self._lmdb.begin(write=write)
        with transaction:
            yield transaction

    def _grow(self, double: bool) -> None:
        """Double the map, or take over the size that another process gave it."""
        with self._condition:
            self._condition.wait_for(lambda: not self._growing)
            self._growing = True
            self._condition.wait_for(lambda: self._active == 0)
            try:
                size = int(self._lmdb.info()["map_size"]) * 2
                if double and size > _LARGEST_MAP:
                    raise CatalogError(
                        f"{self._path}: the catalog has outgrown {_LARGEST_MAP} bytes; start another one"
                    )
                self._lmdb.set_mapsize(size if double else 0)
            finally:
                self._growing = False
                self._condition.notify_all()

    def _explain(self, verb: str, error: Exception) -> CatalogError:
        """Return a sentence for an error of LMDB or of the file system."""
        remedy = (
            "make it writable, or name another directory with --catalog"
            if isinstance(error, (OSError, lmdb.ReadonlyError))
            else "everything in it can be rebuilt: move it away, or name another directory with --catalog"
        )
        return CatalogError(f"{self._path}: the catalog cannot be {verb} ({error}); {remedy}")
