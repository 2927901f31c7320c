"""An LMDB environment whose map grows by itself.

LMDB lets a map grow only while the process has no transaction open, so transactions are counted, and the one that
found the map full waits for the others. Readers never wait for a writer.

LMDB maps its files, and a mapped page beyond the end of a file kills the process that touches it. So both files get
their size before LMDB maps it: the lock file with disk blocks, since it is written through the map, the data file
without any for what nobody has written. A data file that is shorter than its pages say was cut off, and is refused.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lmdb

from mergefs.catalog.directory import (
    COMPACTING,
    DATA,
    READERS,
    Users,
    allocate,
    refuse_network,
    stretch,
    sync_directory,
    sync_file,
)
from mergefs.catalog.residency import Residency
from mergefs.errors import CatalogError

_INITIAL_MAP = 16 * 2**20
_LARGEST_MAP = 2**40
_LOCK_FILE_SIZE = 128 * 2**10
"""Above the 64 bytes that each of 1,024 readers takes, and the same in every process."""

Put = tuple[str, bytes, bytes | None]
"""A table, a key, and the value to keep there (None removes the key)."""

REBUILD = "everything in it can be rebuilt: `mergefs catalog check --repair` keeps what can still be read"
"""What to do about damage."""


class Environment:
    """The tables of one catalog directory. It must be opened after forking, never before.

    A process opens a directory once (LMDB's own locks allow no more): use ``Environment.shared``.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _opened: ClassVar[dict[tuple[int, Path], tuple["Environment", int]]] = {}

    @classmethod
    def shared(cls, path: Path, tables: Sequence[str]) -> "Environment":
        """Return the environment of ``path`` that this process has open, or open it; ``close`` it as often."""
        key = (os.getpid(), Path(os.path.realpath(path)))
        with cls._lock:
            found, uses = cls._opened.get(key) or (cls(path, tables), 0)
            found._key = key
            cls._opened[key] = (found, uses + 1)
            return found

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._path = path
        self._process = os.getpid()
        self._key: tuple[int, Path] | None = None
        self._condition = threading.Condition()
        self._active = 0
        self._growers = 0
        self._residency = Residency(path / DATA)
        try:
            refuse_network(next(place for place in (path, *path.parents) if place.exists()))
            path.mkdir(parents=True, exist_ok=True)
            self._users = Users(path)
        except OSError as error:
            raise self._explain("opened", error) from error
        try:
            alone = self._users.enter()
            self._refuse_missing(alone)
            self._open(tables)
            if alone:
                self._users.share()
        except (lmdb.Error, OSError) as error:
            self._users.close()
            raise self._explain("opened", error) from error
        except BaseException:
            self._users.close()
            raise

    def _open(self, tables: Sequence[str]) -> None:
        """Give the files their sizes and open them."""
        allocate(self._path / READERS, _LOCK_FILE_SIZE)
        self._lmdb: Any = lmdb.open(
            str(self._path), map_size=_INITIAL_MAP, max_dbs=len(tables) + 1, max_readers=1024, create=True
        )
        try:
            self._refuse_truncated()
            self._stretch()
            self._lmdb.reader_check()
            self._tables = {name: self._lmdb.open_db(name.encode()) for name in tables}
        except BaseException:
            self._lmdb.close()
            raise

    def _refuse_missing(self, alone: bool) -> None:
        """Raise CatalogError where one of the files was removed while other processes have it open."""
        missing = [name for name in (DATA, READERS) if not (self._path / name).exists()]
        if missing and not alone:
            raise CatalogError(
                f"{self._path}: {missing[0]} was removed while {self._users.names()} had the catalog open, and two "
                "processes must not use different files; end that process, and the catalog starts anew"
            )

    @property
    def path(self) -> Path:
        """The directory of the environment."""
        return self._path

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None."""
        with self._transaction(write=False) as transaction:
            value: bytes | None = transaction.get(key, db=self._tables[table])
            if value is not None:
                self._residency.note(len(value))  # within the transaction: the map stays where it is
            return value

    def items(self, table: str, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        """Return all pairs whose key starts with ``prefix``, in the order of the keys."""
        with self.view() as view:
            return list(view.items(table, prefix))

    @contextmanager
    def view(self) -> Iterator["View"]:
        """Lend one state of all tables, which nothing that is written meanwhile changes."""
        with self._transaction(write=False) as transaction:
            yield View(transaction, self._tables, self._lmdb.open_db(None, txn=transaction))

    def remove(
        self,
        expected: Sequence[tuple[str, bytes, bytes]],
        keep: Callable[["View", str, bytes], bool] = lambda view, table, key: False,
    ) -> int:
        """Remove records (table, key, value) that still have the value, in one transaction; return how many had.

        Those that ``keep`` is true of, in the state that the transaction finds, stay.
        """
        removed = 0
        if not expected:
            return removed
        with self._transaction(write=True) as transaction:
            view = View(transaction, self._tables, None)
            for table, key, value in expected:
                if view.get(table, key) == value and not keep(view, table, key):
                    removed += bool(transaction.delete(key, db=self._tables[table]))
        return removed

    def count(self, table: str) -> int:
        """Return the number of keys in ``table``."""
        with self._transaction(write=False) as transaction:
            return int(transaction.stat(self._tables[table])["entries"])

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the pages of each table, and of those that are free or hold LMDB's own."""
        with self.view() as view:
            tables = {table: view.size(table) for table in self._tables}
            rest = (self._file_sizes()[1]) - sum(tables.values())
        return tables | {"free": rest}

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep other processes out, if none has the catalog open; lends whether that is so."""
        is_alone = self._users.try_alone()
        if not is_alone:
            self._users.share()  # asking has given up what was held
        try:
            yield is_alone
        finally:
            if is_alone:
                self._users.share()

    def other_users(self) -> str:
        """Return the other processes that have the catalog open, as words."""
        return self._users.names()

    def compact(self) -> None:
        """Put a copy without free pages in the place of the data file; nobody else may have the catalog open."""
        with self._condition:
            self._condition.wait_for(lambda: self._active == 0 and self._growers == 0)
            place = self._path / COMPACTING
            try:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                self._lmdb.copy(str(place), compact=True)
                sync_file(place / DATA)
                self._lmdb.close()
                (place / DATA).replace(self._path / DATA)
                sync_directory(self._path)
                place.rmdir()
                self._open(tuple(self._tables))
            except (lmdb.Error, OSError) as error:
                raise self._explain("compacted", error) from error

    def size_on_disk(self) -> int:
        """Return the bytes that the file takes on the disk."""
        return (self._path / DATA).stat().st_blocks * 512

    def write(self, puts: Sequence[Put], given: tuple[str, bytes] | None = None) -> None:
        """Apply ``puts`` in one durable transaction: all of them or none.

        Where a table and a key are ``given``, none while there is no such record.
        """
        while True:
            announced = False
            try:
                with self._transaction(write=True) as transaction:
                    if given is not None and transaction.get(given[1], db=self._tables[given[0]]) is None:
                        return
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
                # A process that was killed while it read keeps pages from being used again.
                self._grow(double=not self._lmdb.reader_check())

    def _apply(self, puts: Sequence[Put], transaction: Any) -> None:
        """Put and delete within a transaction."""
        for table, key, value in puts:
            if value is None:
                transaction.delete(key, db=self._tables[table])
            else:
                transaction.put(key, value, db=self._tables[table])

    def close(self) -> None:
        """Close the environment, unless others of this process still use it."""
        with self._lock:
            if self._key is not None:
                found, uses = self._opened[self._key]
                if uses > 1:
                    self._opened[self._key] = (found, uses - 1)
                    return
                del self._opened[self._key]
            self._lmdb.close()
            self._users.close()

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
        if os.getpid() != self._process:
            raise CatalogError(
                f"{self._path}: the catalog was opened before this process forked, and LMDB does not survive that; "
                "open it in the new process"
            )
        followed = False
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._growers == 0)
                self._active += 1
            try:
                return self._lmdb.begin(write=write)
            except lmdb.MapResizedError:
                self._leave()
                before = int(self._lmdb.info()["map_size"])
                self._announce_growth()
                self._grow(double=False)
                if int(self._lmdb.info()["map_size"]) <= before and followed:
                    raise self._explain("used", lmdb.CorruptedError("its last page lies beyond its map")) from None
                followed = True
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
                if double:
                    stretch(self._path / DATA, size)
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

    def _refuse_truncated(self) -> None:
        """Raise CatalogError when the data file has been cut off."""
        size, needed = self._file_sizes()
        if size < needed:
            raise lmdb.CorruptedError(f"{DATA} has {size} bytes and needs {needed}")

    def _stretch(self) -> None:
        """Give the data file the size of the map."""
        stretch(self._path / DATA, int(self._lmdb.info()["map_size"]))

    def _explain(self, verb: str, error: Exception) -> CatalogError:
        """Return a sentence for an error of LMDB or of the file system."""
        number = getattr(error, "errno", None)
        remedy = (
            "free some space, or name another directory with --catalog"
            if number == errno.ENOSPC or isinstance(error, lmdb.DiskError)
            else "make it writable, or name another directory with --catalog"
            if isinstance(error, (OSError, lmdb.ReadonlyError))
            else REBUILD
        )
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return CatalogError(f"{self._path}: the catalog cannot be {verb} ({reason}); {remedy}")


class View:
    """One state of the tables of an environment, while it is lent."""

    def __init__(self, transaction: Any, tables: Mapping[str, Any], names: Any) -> None:
        self._transaction = transaction
        self._tables = tables
        self._names = names

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None."""
        value: bytes | None = self._transaction.get(key, db=self._tables[table])
        return value

    def items(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield the pairs whose key starts with ``prefix``, in the order of the keys.

        Raises lmdb.Error where the pages are damaged; going round in them for ever is one way to be.
        """
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(prefix):
                return
            last = None
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                if last is not None and key <= last:
                    raise lmdb.CorruptedError(f"keys of table {table!r} are out of order")
                last = key
                yield key, value

    def count(self, table: str) -> int:
        """Return the number of keys that the table says to have."""
        return int(self._transaction.stat(self._tables[table])["entries"])

    def size(self, table: str) -> int:
        """Return the bytes of the pages of a table."""
        found = self._transaction.stat(self._tables[table])
        return int(found["psize"]) * int(found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"])

    def names(self) -> list[str]:
        """Return the names of all tables in the file, also of those that this version does not know."""
        with self._transaction.cursor(db=self._names) as cursor:
            return [key.decode(errors="replace") for key in cursor.iternext(keys=True, values=False)]
