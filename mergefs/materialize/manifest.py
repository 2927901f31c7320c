"""The manifest of a written model: the size and the hash of every file."""

from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from mergefs.errors import VerificationError

MANIFEST_NAME: Final = "mergefs.manifest.json"
_FORMAT: Final = 1


class FileEntry(msgspec.Struct, frozen=True):
    """One file: its size in bytes and the blake3 hash of its content, in hex."""

    size: int
    blake3: str


class Manifest(msgspec.Struct, frozen=True):
    """What ``mergefs.manifest.json`` holds. Nothing in it depends on the machine or on the time."""

    format: int
    plan_id: str
    files: dict[str, FileEntry]
    expert_bytes_planned: int
    expert_bytes_read: int
    mergefs_version: str

    @classmethod
    def create(cls, plan_id: str, files: dict[str, FileEntry], planned: int, read: int, version: str) -> "Manifest":
        """Return a manifest of the current format."""
        return cls(_FORMAT, plan_id, dict(sorted(files.items())), planned, read, version)

    def encode(self) -> bytes:
        """Return the file's bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of ``directory``; VerificationError when there is none or it is damaged."""
    path = directory / MANIFEST_NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise VerificationError(
            f"{path}: cannot be read ({error.strerror}); only models written by `mergefs materialize` can be verified"
        ) from error
    except msgspec.DecodeError as error:
        raise VerificationError(f"{path}: is damaged ({error}); materialize the model again") from error
    if manifest.format != _FORMAT:
        raise VerificationError(
            f"{path}: has format {manifest.format} and this mergefs knows format {_FORMAT}; upgrade mergefs"
        )
    outside = next(
        (name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in name.split("/")), None
    )
    if outside is not None:
        raise VerificationError(
            f"{path}: lists {outside!r}, which is outside of the directory, so it is not as mergefs wrote it; "
            "materialize the model again"
        )
    return manifest
