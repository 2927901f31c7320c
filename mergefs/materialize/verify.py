"""``mergefs verify``: a written model against its manifest."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs.checkpoint.dtypes import DTYPES
from mergefs.errors import VerificationError
from mergefs.materialize.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from mergefs.materialize.pieces import Pieces, ahead
from mergefs.materialize.system import read_all
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence

_RUN: Final = 8 * 2**20
"""Bytes that are read at a time."""
_REMEDY: Final = "materialize the model again"
_LOADED: Final = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Endings of files that loaders take weights from, or where to find them."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written. ``piece`` is a number of its ``Pieces``; it and ``tensors`` may be none.

    ``sentence`` says all of it, and what to do.
    """

    file: Path
    piece: int | None
    tensors: tuple[str, ...]
    sentence: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found sound. ``recomputed_bytes`` are those that were compared with what the sources give now."""

    directory: Path
    plan_id: str
    manifest: str
    files: int
    bytes_checked: int
    recomputed_bytes: int = 0


def verify(directory: Path, progress: Progress | None = None) -> Verified:
    """Check size and hashes of every file in the manifest; VerificationError names the first damage."""
    manifest = read_manifest(directory)
    for damage in find_damage(directory, manifest, progress):
        raise VerificationError(damage.sentence)
    return sound(directory, manifest)


def sound(directory: Path, manifest: Manifest) -> Verified:
    """Return what is said of a model in which no damage was found."""
    total = sum(entry.size for entry in manifest.files.values())
    return Verified(directory, manifest.plan_id, manifest.manifest, len(manifest.files), total)


def find_damage(directory: Path, manifest: Manifest, progress: Progress | None = None) -> Iterator[Damage]:
    """Yield all that is not as the manifest says, file by file and from the beginning of each to its end."""
    listener = progress or Silence()
    listener.start("verifying", sum(entry.size for entry in manifest.files.values()))
    with ThreadPoolExecutor(max(2, usable_processors()), thread_name_prefix="verify") as pool:
        for name, entry in manifest.files.items():
            path = directory / name
            try:
                yield from _damage_of(path, name, entry, manifest, pool, listener)
            except OSError as error:
                yield _whole(path, f"{path}: cannot be read ({error.strerror}); {_REMEDY}")
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name.endswith(_LOADED) and name not in manifest.files:
            yield _whole(path, f"{path}: is not in {MANIFEST_NAME}; remove it, since loaders may pick it up")
    listener.finish()


def _damage_of(
    path: Path, name: str, entry: FileEntry, manifest: Manifest, pool: ThreadPoolExecutor, progress: Progress
) -> Iterator[Damage]:
    """Yield what is wrong with one file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != entry.size:
            yield _whole(path, f"{path}: has {size} bytes and was written with {entry.size}; {_REMEDY}")
            return
        if not entry.pieces:
            yield from _damage_of_small(path, descriptor, entry, progress)
            return

        pieces = _pieces_of(name, manifest)
        if pieces is None:
            yield _whole(path, f"{path}: its pieces in {MANIFEST_NAME} do not fit its tensors there; {_REMEDY}")
            return
        runs = list(pieces.runs(_RUN))

        def hashes_of(number: int) -> tuple[str, ...]:
            begin, end = pieces.bounds[runs[number].start], pieces.bounds[runs[number].stop]
            return pieces.hashes(runs[number], memoryview(read_all(descriptor, end - begin, begin)))

        for run, found in zip(runs, ahead(pool, hashes_of, range(len(runs))), strict=True):
            for piece, one in zip(run, found, strict=True):
                if one != entry.pieces[piece]:
                    yield _damaged_piece(path, piece, pieces, entry)
            progress.advance(pieces.bounds[run.stop] - pieces.bounds[run.start])
    finally:
        os.close(descriptor)


def _damage_of_small(path: Path, descriptor: int, entry: FileEntry, progress: Progress) -> Iterator[Damage]:
    """Yield what is wrong with a file that has no pieces."""
    found = blake3(read_all(descriptor, entry.size, 0)).hexdigest()
    if found != entry.blake3:
        yield _whole(
            path,
            f"{path}: is damaged: its blake3 hash is {found[:16]}... and was {entry.blake3[:16]}...; {_REMEDY}",
        )
    progress.advance(entry.size)


def _pieces_of(name: str, manifest: Manifest) -> Pieces | None:
    """Return how a weight file was cut, None where that is not how many hashes there are."""
    entries = sorted((one.offset, one.size, tensor) for tensor, one in manifest.tensors.items() if one.file == name)
    placed = []
    for offset, _, tensor in entries:
        one = manifest.tensors[tensor]
        if one.dtype in DTYPES:
            placed.append((tensor, offset, DTYPES[one.dtype], one.shape))
    entry = manifest.files[name]
    pieces = Pieces.of(entry.size, placed)
    fits = (pieces.count, pieces.bounds[-1]) == (len(entry.pieces), entry.size)
    return pieces if fits and len(placed) == len(entries) else None


def _damaged_piece(path: Path, piece: int, pieces: Pieces, entry: FileEntry) -> Damage:
    """Return the damage of one piece."""
    begin, end = pieces.bounds[piece : piece + 2]
    tensor = pieces.tensor_of(piece)
    return Damage(
        path,
        piece,
        () if tensor is None else (tensor,),
        f"{path}: is damaged in {'its header' if tensor is None else f'tensor {tensor!r}'}, piece {piece} (bytes "
        f"{begin} to {end}): the blake3 hash there is not {entry.pieces[piece][:16]}... any more; {_REMEDY}",
    )


def _whole(path: Path, sentence: str) -> Damage:
    """Return the damage of a whole file."""
    return Damage(path, None, (), sentence)
