"""The manifest of a written model: hashes of its files, its tensors, and each piece of its weights."""

from pathlib import Path, PurePosixPath
from typing import Final

import msgspec
from blake3 import blake3

from mergefs.errors import VerificationError

MANIFEST_NAME: Final = "mergefs.manifest.json"
PIECE: Final = 2**20
"""Bytes of a piece of a weight file, wherever tensors begin; the last one of a file may be shorter."""
_FORMAT: Final = 2


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file: its size in bytes, the blake3 hash of its content in hex, and of each piece of it if it has weights."""

    size: int
    blake3: str
    pieces: tuple[str, ...] = ()


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor: its bytes lie at ``offset`` of ``file`` and have the blake3 hash that is given in hex."""

    file: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    blake3: str


class BytesRead(msgspec.Struct, frozen=True):
    """What writing the model has read, in bytes, by all runs that it took."""

    expert_bytes: int
    base_bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What ``mergefs.manifest.json`` holds.

    ``manifest`` is the blake3 hash of all fields but itself and ``read``, which depends on what a cache has dropped and
    on how often the work was interrupted; the others depend on the inputs, the recipe and the version alone.
    ``content`` is the identity of the model, as a recipe's input.
    """

    format: int
    manifest: str
    plan_id: str
    content: str
    mergefs_version: str
    piece_bytes: int
    expert_bytes_planned: int
    read: BytesRead
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @classmethod
    def create(
        cls,
        plan_id: str,
        content: str,
        version: str,
        planned: int,
        read: BytesRead,
        files: dict[str, FileEntry],
        tensors: dict[str, TensorEntry],
    ) -> "Manifest":
        """Return a manifest of the current format."""
        listed = dict(sorted(files.items())), dict(sorted(tensors.items()))
        unsigned = cls(_FORMAT, "", plan_id, content, version, PIECE, planned, read, *listed)
        return msgspec.structs.replace(unsigned, manifest=unsigned.digest())

    def digest(self) -> str:
        """Return what ``manifest`` must be."""
        hashed = msgspec.structs.replace(self, manifest="", read=BytesRead(0, 0))
        return blake3(msgspec.json.encode(hashed, order="deterministic")).hexdigest()

    def encode(self) -> bytes:
        """Return the file's bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class _Format(msgspec.Struct, frozen=True):
    """The field that every format has."""

    format: int


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of ``directory``; VerificationError when there is none, or it is not as it was written."""
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Format).format
        if found != _FORMAT:
            raise VerificationError(
                f"{path}: has format {found} and this mergefs knows format {_FORMAT}; "
                + ("upgrade mergefs" if found > _FORMAT else "materialize the model again")
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise VerificationError(
            f"{path}: cannot be read ({error.strerror}); only models written by `mergefs materialize` can be verified"
        ) from error
    except msgspec.DecodeError as error:
        raise VerificationError(f"{path}: is damaged ({error}); materialize the model again") from error
    outside = next(
        (name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in name.split("/")), None
    )
    if outside is not None:
        raise VerificationError(
            f"{path}: lists {outside!r}, which is outside of the directory, so it is not as mergefs wrote it; "
            "materialize the model again"
        )
    if manifest.digest() != manifest.manifest:
        raise VerificationError(
            f"{path}: is damaged: its hash is {manifest.digest()[:16]}... and was {manifest.manifest[:16]}...; "
            "materialize the model again"
        )
    return manifest


def manifest_hash(directory: Path) -> str | None:
    """Return the hash of the manifest in ``directory``, None where there is no sound one."""
    try:
        return read_manifest(directory).manifest
    except VerificationError:
        return None
