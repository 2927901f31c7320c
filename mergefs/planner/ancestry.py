"""What the inputs of a merge were made of, where mergefs has made them: told by the ``mergefs.json`` beside them."""

from pathlib import Path
from typing import Any, Final

import msgspec

PROVENANCE_NAME: Final = "mergefs.json"
LARGEST_PROVENANCE: Final = 16 * 2**20
"""Bytes; one that is larger was not written by mergefs, and would grow in every merge of this model."""


class Ancestor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input of a merge: as its recipe calls it, what it was, and what it was made of.

    ``inputs`` are those of a merge of the same recipe file, ``made_by`` the merge that wrote the model's directory.
    """

    reference: str
    role: str
    identity: str
    inputs: tuple["Ancestor", ...] = ()
    made_by: "Ancestry | None" = None


class Ancestry(msgspec.Struct, frozen=True):
    """A merge: its plan, its method and its inputs, with theirs in turn."""

    plan_id: str
    method: str
    inputs: tuple[Ancestor, ...]


class UnreadableProvenanceError(Exception):
    """A ``mergefs.json`` that is not as mergefs writes it. The message says why."""


def read_ancestry(directory: Path) -> Ancestry | None:
    """Return what the model in ``directory`` was made of, None where mergefs has not made it.

    Raises UnreadableProvenanceError.
    """
    path = directory / PROVENANCE_NAME
    try:
        if path.stat().st_size > LARGEST_PROVENANCE:
            raise UnreadableProvenanceError(f"it is larger than {LARGEST_PROVENANCE} bytes")
        return msgspec.json.decode(path.read_bytes(), type=Ancestry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableProvenanceError(error.strerror or str(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnreadableProvenanceError(str(error)) from error


def as_json(ancestry: Ancestry) -> dict[str, Any]:
    """Return an ancestry as JSON types, without what is empty."""
    content: dict[str, Any] = msgspec.to_builtins(ancestry)
    return content
