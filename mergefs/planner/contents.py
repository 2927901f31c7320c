"""What the inputs of a merge hold, by hashes: told by the manifest of a model, since a mount may not know it."""

from pathlib import Path
from typing import Any, Final

import msgspec
from blake3 import blake3

MANIFEST_NAME: Final = "mergefs.manifest.json"
FORMAT: Final = 5
"""The format of manifests."""
_LARGEST_MANIFEST: Final = 2**28
"""Bytes; that of a model of some terabytes."""


class InputContents(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input by its reference in the recipe, and its identity by contents; empty where that is not known.

    ``inputs`` are those of a merge of the same recipe file, whose identity is the id of its plan.
    """

    reference: str
    identity: str = ""
    inputs: tuple["InputContents", ...] = ()


class Contents(msgspec.Struct, frozen=True):
    """What the inputs of a plan hold, and what stands in for blocks that are not bought where that is no input."""

    inputs: tuple[InputContents, ...]
    stand_in: InputContents | None

    @property
    def all_inputs(self) -> tuple[InputContents, ...]:
        """The inputs, and the stand-in where there is one."""
        return self.inputs if self.stand_in is None else (*self.inputs, self.stand_in)


class _Signed(msgspec.Struct, frozen=True):
    """The fields of a manifest that tell which model it is about, and what was in it."""

    format: int
    manifest: str
    contents: Contents
    files: dict[str, dict[str, Any]]


def contents_beside(directory: Path, name: str, provenance: bytes) -> Contents | None:
    """Return what the manifest in ``directory`` tells of the inputs; None unless it is sound and about this model.

    It is about the model whose file ``name`` holds ``provenance``.
    """
    path = directory / MANIFEST_NAME
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            return None
        everything = msgspec.json.decode(path.read_bytes())
        found = msgspec.convert(everything, _Signed)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        return None
    is_sound = found.format == FORMAT and found.manifest == manifest_digest(everything)
    described = found.files.get(name, {}).get("blake3")
    return found.contents if is_sound and described == blake3(provenance).hexdigest() else None


def manifest_digest(content: dict[str, Any]) -> str:
    """Return what the field ``manifest`` of a manifest must be.

    That is the blake3 hash of all other fields but ``cost``, as JSON without spaces and with sorted names.
    """
    signed = {name: value for name, value in content.items() if name not in ("manifest", "cost")}
    return blake3(msgspec.json.encode(signed, order="sorted")).hexdigest()
