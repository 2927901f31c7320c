"""Copies what can be read of a damaged file into a new one, in a process of its own that reading may kill."""

from pathlib import Path

import lmdb

from mergefs.catalog.catalog import FORMAT, FORMAT_KEY
from mergefs.catalog.directory import DATA, SALVAGE, stretch
from mergefs.catalog.envelope import UnsealedError, unseal
from mergefs.catalog.environment import Environment, Put, View
from mergefs.catalog.schema import META, SCHEMA, TABLES

_BATCH = 500


def salvage(path: Path) -> None:
    """Write the records of the catalog at ``path`` that can be read to a new catalog in its directory ``SALVAGE``.

    The caller keeps every other process out. What has been copied is kept when the pages of the old file kill this
    process.
    """
    new = Environment(path / SALVAGE, TABLES)
    new.write([(META, FORMAT_KEY, str(FORMAT).encode())])
    try:
        old = lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(TABLES) + 1)
    except lmdb.Error:
        new.close()
        return
    # Where the file was cut off, zeros take the place of what is missing: a page beyond its end kills who reads it.
    stretch(path / DATA, (int(old.info()["last_pgno"]) + 1) * int(old.stat()["psize"]))
    for table in SCHEMA:
        _copy_table(old, table, new)
    old.close()
    new.close()


def _copy_table(old: "lmdb.Environment", table: str, new: Environment) -> None:
    """Copy the records of one table, up to the first page that cannot be read."""
    batch: list[Put] = []
    try:
        handle = old.open_db(table.encode(), create=False)
        with old.begin() as transaction:
            for key, value in View(transaction, {table: handle}, None).items(table):
                try:
                    unseal(table, key, value)
                except UnsealedError:
                    continue
                batch.append((table, key, value))
                if len(batch) >= _BATCH:
                    new.write(batch)
                    batch.clear()
    except lmdb.Error:
        pass  # what comes after it is lost
    if batch:
        new.write(batch)
