"""Keeps the delta planes of experts in the catalog: only those that are not there yet, and safe from interruptions."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import PlanesRecord
from mergefs.planes.coded import known_planes, planes_keys
from mergefs.planes.encoding import DeltaTask, TensorEncoder, encoding_pool
from mergefs.planes.files import PlaneFile, planes_directory, remove_leftovers
from mergefs.progress import Progress
from mergefs.sources.reader import SourceReader
from mergefs.statistics.identity import sources_of, tensor_keys

_FILE_BYTES: Final = 256 * 2**20
"""A file that has grown to this is closed and recorded, and another one begun."""


@dataclass(frozen=True, slots=True)
class PlanesWritten:
    """What was done for one expert: tensors coded now, bytes written, and the files that they are in.

    ``known`` tensors had enough planes already, ``equal`` ones are the base's and need none.
    """

    tensors: int = 0
    known: int = 0
    equal: int = 0
    bytes_written: int = 0
    files: tuple[Path, ...] = ()


def analyze_planes(
    tasks: Mapping[str, Sequence[DeltaTask]], catalog: Catalog, reader: SourceReader, progress: Progress
) -> dict[str, PlanesWritten]:
    """Code the deltas of experts, each a sequence of tasks, and return what was written for each.

    What the catalog knows with as many planes is left as it is, whichever expert it was coded for. What is done is kept
    every so often, and what is whole also where the work ends by an error, so it goes on from there.
    Raises NonFiniteError, CatalogError where files cannot be written, and the errors of reading.
    """
    remove_leftovers(planes_directory(catalog.path))
    differing = {
        expert: [task for task in wanted if not _is_the_bases(task, catalog)] for expert, wanted in tasks.items()
    }
    missing = {
        expert: [task for task in wanted if not _is_known(task, catalog)] for expert, wanted in differing.items()
    }
    total = sum(task.expert.nbytes for work in missing.values() for task in work)
    if total:
        progress.start("coding deltas", total)
    done: dict[str, PlanesWritten] = {}
    with encoding_pool() as pool:
        for expert, work in missing.items():
            written = _Run(catalog, reader, pool, progress).encode(work)
            differ = len(differing[expert])
            done[expert] = replace(written, known=differ - written.tensors, equal=len(tasks[expert]) - differ)
    if total:
        progress.finish()
    return done


def _is_the_bases(task: DeltaTask, catalog: Catalog) -> bool:
    """Return whether the tensor is known to have the base's bytes."""
    keys = (set(tensor_keys(place, catalog)) for place in (task.expert, task.base))
    return task.expert.dtype == task.base.dtype and bool(set.intersection(*keys))


def _is_known(task: DeltaTask, catalog: Catalog) -> bool:
    """Return whether the catalog has these planes, and in these cells."""
    known = known_planes(task.expert, task.base, task.compute, catalog)
    return known is not None and known.planes >= task.planes and known.grid == task.grid


class _Run:
    """Codes tensors of one expert into files."""

    def __init__(self, catalog: Catalog, reader: SourceReader, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self._catalog = catalog
        self._reader = reader
        self._pool = pool
        self._progress = progress
        self._file: PlaneFile | None = None
        self._whole: dict[bytes, tuple[PlanesRecord, bytes]] = {}
        self._written = PlanesWritten()

    def encode(self, tasks: Sequence[DeltaTask]) -> PlanesWritten:
        """Code ``tasks``, and keep what is whole however it ends."""
        try:
            for task in tasks:
                # Two tensors of an expert may have the same bytes.
                if self._key(task) in self._whole or _is_known(task, self._catalog):
                    self._progress.advance(task.expert.nbytes)
                else:
                    self._encode(task)
        finally:
            self._commit()
        return self._written

    def _encode(self, task: DeltaTask) -> None:
        """Append the records of one tensor to the file, and begin another file where it has become large."""
        file = self._file = self._file or PlaneFile(planes_directory(self._catalog.path))
        encoder = TensorEncoder(task, self._reader, self._pool)
        begin = file.size
        for cell, encoded in enumerate(encoder):
            file.append(encoded)
            start, stop = task.grid.bounds(cell)
            self._progress.advance((stop - start) * task.expert.dtype.itemsize)
        errors = encoder.errors()
        record = PlanesRecord(
            planes=task.planes,
            cell=task.grid.step,
            group=task.group,
            coded=errors.coded.tobytes(),
            left=errors.left.tobytes(),
            digest=errors.digest,
            file="",
            file_size=0,
            mtime_ns=0,
            offset=begin,
        )
        file.seal()
        self._whole[self._key(task)] = record, sources_of(self._catalog, task.expert, task.base)
        if file.size >= _FILE_BYTES:
            self._commit()

    def _key(self, task: DeltaTask) -> bytes:
        """Return the best key of the planes of a task."""
        return planes_keys(task.expert, task.base, task.compute, self._catalog)[0]

    def _commit(self) -> None:
        """Close the file and record the tensors that are whole; without any there is no file."""
        file, whole = self._file, self._whole
        self._file, self._whole = None, {}
        if file is None:
            return
        if not whole:
            file.give_up()
            return
        name, status = file.commit()
        for key, (record, about) in whole.items():
            placed = msgspec.structs.replace(record, file=name, file_size=status.st_size, mtime_ns=status.st_mtime_ns)
            self._catalog.keep_planes(key, placed, about)
        self._catalog.flush()
        written = self._written
        self._written = replace(
            written,
            tensors=written.tensors + len(whole),
            bytes_written=written.bytes_written + status.st_size,
            files=(*written.files, planes_directory(self._catalog.path) / name),
        )
