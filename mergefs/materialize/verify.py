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
from mergefs.materialize.manifest import MANIFEST_NAME, PIECE, FileEntry, Manifest, TensorEntry, read_manifest
from mergefs.materialize.pieces import ahead, hash_pieces
from mergefs.materialize.system import read_all
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence
from mergefs.statistics.hashing import ContentHasher

_CHUNK: Final = 8 * PIECE
_REMEDY: Final = "materialize the model again"
_LOADED: Final = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Endings of files that loaders take weights from, or where to find them."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written. ``piece`` counts MiB of the file from 0; it and ``tensors`` may be none.

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

        def hash_chunk(offset: int) -> tuple[int, tuple[str, ...]]:
            return offset, hash_pieces(read_all(descriptor, min(_CHUNK, size - offset), offset))

        for offset, found in ahead(pool, hash_chunk, range(0, size, _CHUNK)):
            first = offset // PIECE
            for index, (one, other) in enumerate(zip(found, entry.pieces[first:], strict=False), start=first):
                if one != other:
                    yield _damaged_piece(path, name, index, descriptor, manifest)
            progress.advance(min(_CHUNK, size - offset))
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


def _content(descriptor: int, entry: TensorEntry) -> str:
    """Return what a tensor is known by now."""
    hasher = ContentHasher(DTYPES[entry.dtype], entry.shape)
    hasher.update(memoryview(read_all(descriptor, entry.size, entry.offset)))
    return hasher.finish().hex()


def _damaged_piece(path: Path, name: str, piece: int, descriptor: int, manifest: Manifest) -> Damage:
    """Return the damage of one piece: which of the tensors that lie in it are not what they were."""
    begin, end = piece * PIECE, min((piece + 1) * PIECE, manifest.files[name].size)
    inside = {
        tensor: entry
        for tensor, entry in sorted(manifest.tensors.items(), key=lambda item: item[1].offset)
        if entry.file == name and entry.offset < end and entry.offset + entry.size > begin
    }
    damaged = tuple(tensor for tensor, entry in inside.items() if _content(descriptor, entry) != entry.content)
    where = f"tensor {', '.join(map(repr, damaged))}" if damaged else "its header"
    return Damage(
        path,
        piece,
        damaged,
        f"{path}: is damaged in {where}, piece {piece} (bytes {begin} to {end}): the blake3 hash there is not "
        f"{manifest.files[name].pieces[piece][:16]}... any more; {_REMEDY}",
    )


def _whole(path: Path, sentence: str) -> Damage:
    """Return the damage of a whole file."""
    return Damage(path, None, (), sentence)
