"""The manifest of a written model: hashes of its files, its tensors, and each piece of its weights."""

from pathlib import Path, PurePosixPath

import msgspec
from blake3 import blake3

from mergefs.errors import VerificationError
from mergefs.planner.contents import FORMAT, MANIFEST_NAME, Contents, manifest_digest
from mergefs.statistics.identity import plan_id as whole_plan_id

__all__ = ["MANIFEST_NAME", "Cost", "FileEntry", "Manifest", "TensorEntry", "manifest_hash", "read_manifest"]


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file: its size in bytes and a blake3 hash in hex; of each of its ``Pieces``, too, if it has weights.

    The hash is that of the content; where there are pieces, that of their hashes (32 bytes each) one after the other.
    """

    size: int
    blake3: str
    pieces: tuple[str, ...] = ()

    @classmethod
    def of_pieces(cls, size: int, pieces: tuple[str, ...]) -> "FileEntry":
        """Return the entry of a weight file: no byte is hashed again for it."""
        return cls(size, blake3(bytes.fromhex("".join(pieces))).hexdigest(), pieces)


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor: its bytes lie at ``offset`` of ``file``; ``content`` is what it is known by (``content_digest``)."""

    file: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    content: str


class Cost(msgspec.Struct, frozen=True):
    """Bytes that were planned to be read of experts, and what writing the model has read, by all runs that it took."""

    expert_bytes_planned: int
    expert_bytes_read: int
    base_bytes_read: int


class Manifest(msgspec.Struct, frozen=True):
    """What ``mergefs.manifest.json`` holds.

    ``manifest`` is the hash (``manifest_digest``) of all fields but itself and ``cost``, which depends on which blocks
    were known to be equal, on what a cache has dropped, and on how often the work was interrupted; the others depend on
    the inputs, the recipe and the version alone. ``plan_id`` is the half of the plan's id that says what is asked,
    ``contents`` says what the inputs held, and ``content`` is the identity of the model, as a recipe's input.
    """

    format: int
    manifest: str
    plan_id: str
    contents: Contents
    content: str
    mergefs_version: str
    cost: Cost
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @classmethod
    def create(
        cls,
        plan_id: str,
        contents: Contents,
        content: str,
        version: str,
        cost: Cost,
        files: dict[str, FileEntry],
        tensors: dict[str, TensorEntry],
    ) -> "Manifest":
        """Return a manifest of the current format."""
        listed = dict(sorted(files.items())), dict(sorted(tensors.items()))
        unsigned = cls(FORMAT, "", plan_id, contents, content, version, cost, *listed)
        return msgspec.structs.replace(unsigned, manifest=manifest_digest(msgspec.to_builtins(unsigned)))

    def encode(self) -> bytes:
        """Return the file's bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @property
    def whole_id(self) -> str:
        """The plan's id, as far as it is known: with its second half where the contents of all inputs are."""
        identities = [entry.identity for entry in self.contents.all_inputs]
        return whole_plan_id(self.plan_id, identities) if all(identities) else self.plan_id


class _Format(msgspec.Struct, frozen=True):
    """The field that every format has."""

    format: int


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of ``directory``; VerificationError when there is none, or it is not as it was written."""
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise VerificationError(
                f"{path}: has format {found} and this mergefs knows format {FORMAT}; "
                + ("upgrade mergefs" if found > FORMAT else "materialize the model again")
            )
        everything = msgspec.json.decode(data)
        manifest = msgspec.convert(everything, Manifest)
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
    digest = manifest_digest(everything)
    if digest != manifest.manifest:
        raise VerificationError(
            f"{path}: is damaged: its hash is {digest[:16]}... and was {manifest.manifest[:16]}...; "
            "materialize the model again"
        )
    return manifest


def manifest_hash(directory: Path) -> str | None:
    """Return the hash of the manifest in ``directory``, None where there is no sound one."""
    try:
        return read_manifest(directory).manifest
    except VerificationError:
        return None
