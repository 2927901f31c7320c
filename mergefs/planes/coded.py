"""Coded deltas of experts' tensors: what the catalog knows of them, and their values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import PlanesRecord
from mergefs.checkpoint.dtypes import F32, F64, DType
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint, SourceFile
from mergefs.errors import SourceChangedError
from mergefs.kernels.precision import Raw
from mergefs.planes.cell import Prefixes
from mergefs.planes.files import planes_directory
from mergefs.planes.layout import RecordLayout
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.identity import digest, tensor_keys

FORMAT: Final = 1
"""Of the files and of the code: part of every key, so what another version wrote is not found."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedDelta:
    """The delta of one expert's tensor in planes, as a plan uses it.

    Level ``l`` of a cell stands for the base plus what the first ``l`` of the ``planes`` decode to, rounded to the
    compute dtype; level 0 for the base. ``left`` (float32, ``planes`` + 1 rows) bounds the squared distance of the
    expert from it, from above, and never rises with the level. ``digest`` names the coded bytes and what they mean.
    """

    file: SourceFile
    offset: int
    compute: DType
    planes: int
    digest: bytes
    layout: RecordLayout
    left: NDArray[np.float32]
    starts: NDArray[np.int64]

    @property
    def grid(self) -> BlockGrid:
        """The cells."""
        return self.layout.grid

    @property
    def energies(self) -> NDArray[np.float32]:
        """The squared norm of the delta of each cell."""
        energies: NDArray[np.float32] = self.left[0]
        return energies

    @property
    def nbytes(self) -> int:
        """The bytes of all cells with all planes."""
        return int(self.bytes_read(self.planes).sum())

    def kernels(self) -> Iterator[tuple[str, DType]]:
        """Yield the modules of ``mergefs.kernels.fused`` that it is decoded with, each with a dtype."""
        yield "trellis", F32 if self.compute == F64 else self.compute

    def bytes_read(self, level: int) -> NDArray[np.int64]:
        """Return for each cell the bytes that are read of the file for ``level``: a prefix of its record (int64)."""
        return self.layout.prefix_bytes(level)

    def decode(self, reader: SourceReader, base_values: Raw, cells: range, level: int, purpose: Purpose) -> Raw:
        """Return the values of ``cells``, which lie side by side, at ``level`` as bytes of the compute dtype.

        ``base_values`` are the bytes of the same cells of the base, of the compute dtype; they are returned as they are
        where the planes have nothing. Raises SourceChangedError where the file is not the one that was written, or its
        bytes are not, and SourceReadError.
        """
        coded = self.layout.coded[cells.start : cells.stop]
        if level == 0 or not coded.any():
            return base_values
        sizes = self.layout.prefix_bytes(level, cells)
        places = self.offset + self.starts[cells.start : cells.stop]
        pieces = list(zip(places.tolist(), sizes.tolist(), strict=True))
        data = reader.read_pieces(self.file, pieces, purpose)
        prefixes = Prefixes(data, sizes, coded, self.grid.step, self.layout.group, level)
        if not prefixes.is_sound():
            raise SourceChangedError(
                f"{self.file.path}: what was read at offset {places[0]} is not what was written; remove the file, run "
                "mergefs analyze with --planes, and plan again"
            )
        return prefixes.decode(base_values, self.compute)


def planes_keys(expert: Place, base: Place, compute: DType, catalog: Catalog) -> list[bytes]:
    """Return the keys that the planes of a delta may be kept under, the best first."""
    options = [tensor_keys(place, catalog) for place in (expert, base)]
    both = dict.fromkeys((tuple(keys[0] for keys in options), tuple(keys[-1] for keys in options)))
    return [digest("planes", FORMAT, compute.name, *keys) for keys in both]


def can_have_planes(expert: Place, base: Place | None) -> bool:
    """Return whether the delta of a place can be coded: both are stored, of float dtypes and of as many elements."""
    return (
        isinstance(expert, StoredTensor)
        and isinstance(base, StoredTensor)
        and expert.dtype.is_float
        and base.dtype.is_float
        and expert.elements == base.elements
        and expert.elements > 0
    )


def known_planes(expert: Place, base: Place, compute: DType, catalog: Catalog) -> CodedDelta | None:
    """Return the coded delta that the catalog has, or None; also where its file is gone or has been changed."""
    if not can_have_planes(expert, base):
        return None
    for key in planes_keys(expert, base, compute, catalog):
        record = catalog.planes(key)
        file = None if record is None else _file(record, catalog)
        if record is not None and file is not None:
            return _coded(record, file, expert, compute)
    return None


def _file(record: PlanesRecord, catalog: Catalog) -> AuxiliaryFile | None:
    """Return the file that a record points into, or None where it is not the one that was written."""
    path = planes_directory(catalog.path) / record.file
    try:
        found = Fingerprint.of(path.stat())
    except OSError:
        return None
    same = (found.size, found.mtime_ns) == (record.file_size, record.mtime_ns)
    return AuxiliaryFile(path, found, record.file) if same else None


def _coded(record: PlanesRecord, file: AuxiliaryFile, expert: Place, compute: DType) -> CodedDelta:
    """Return the coded delta of a record."""
    coded = np.frombuffer(record.coded, dtype="<u4").astype(np.int64)
    layout = RecordLayout(BlockGrid(expert.elements, record.cell), record.group, coded)
    sizes = layout.prefix_bytes(record.planes)
    return CodedDelta(
        file=file,
        offset=record.offset,
        compute=compute,
        planes=record.planes,
        digest=record.digest,
        layout=layout,
        left=np.frombuffer(record.left, dtype="<f4").reshape(record.planes + 1, -1),
        starts=np.cumsum(sizes) - sizes,
    )
