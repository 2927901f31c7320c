"""What the inputs of a merge were made of, where mergefs has made them: told by the ``mergefs.json`` beside them."""

from pathlib import Path
from typing import Any, Final

import msgspec

from mergefs.planner.contents import Contents, InputContents, contents_beside
from mergefs.planner.plan_ids import ASKED_DIGITS
from mergefs.statistics.identity import is_local, plan_id

PROVENANCE_NAME: Final = "mergefs.json"
FORMAT: Final = 2
"""The format of ``mergefs.json``."""
LARGEST_PROVENANCE: Final = 16 * 2**20
"""Bytes; one that is larger was not written by mergefs, and would grow in every merge of this model."""


class Ancestor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input of a merge: as its recipe calls it, what it was, and what it was made of.

    ``structure`` is what the headers told, ``identity`` that of its contents, where the manifest of the merge tells it.
    ``inputs`` are those of a merge of the same recipe file, ``made_by`` the merge that wrote the model's directory.
    """

    reference: str
    role: str = ""
    structure: str = ""
    identity: str = ""
    inputs: tuple["Ancestor", ...] = ()
    made_by: "Ancestry | None" = None


class Ancestry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A merge: what was asked (the first half of its plan's id), its method and its inputs, with theirs in turn.

    ``stand_in`` took the place of what was not bought, where that was no input.
    """

    plan_id: str
    method: str
    inputs: tuple[Ancestor, ...]
    stand_in: Ancestor | None = None

    @property
    def all_inputs(self) -> tuple[Ancestor, ...]:
        """The inputs, and the stand-in where there is one."""
        return self.inputs if self.stand_in is None else (*self.inputs, self.stand_in)

    @property
    def whole_id(self) -> str:
        """The plan's id, as far as it is known: with its second half where the contents of all inputs are."""
        identities = [entry.identity for entry in self.all_inputs]
        whole = len(self.plan_id) == ASKED_DIGITS and all(identities)
        return plan_id(self.plan_id, identities) if whole else self.plan_id


class UnreadableProvenanceError(Exception):
    """A ``mergefs.json`` that is not as mergefs writes it. The message says why."""


class _Format(msgspec.Struct, frozen=True):
    """The field that every format has."""

    format: int


def read_ancestry(directory: Path) -> Ancestry | None:
    """Return what the model in ``directory`` was made of, None where mergefs has not made it.

    What the inputs held is taken from the manifest beside it, where there is one that belongs to it. Raises
    UnreadableProvenanceError.
    """
    path = directory / PROVENANCE_NAME
    try:
        if path.stat().st_size > LARGEST_PROVENANCE:
            raise UnreadableProvenanceError(f"it is larger than {LARGEST_PROVENANCE} bytes")
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Format).format
        if found > FORMAT:
            raise UnreadableProvenanceError(f"it has format {found}, and this mergefs knows formats up to {FORMAT}")
        ancestry = msgspec.json.decode(data, type=Ancestry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableProvenanceError(error.strerror or str(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnreadableProvenanceError(str(error)) from error
    if found < FORMAT:
        return _without_local(ancestry)
    contents = contents_beside(directory, PROVENANCE_NAME, data)
    return ancestry if contents is None else _with_contents(ancestry, contents)


def _with_contents(ancestry: Ancestry, contents: Contents) -> Ancestry:
    """Return an ancestry with the identities of its inputs."""
    stand_in = ancestry.stand_in
    if stand_in is not None and contents.stand_in is not None:
        stand_in = _named(stand_in, contents.stand_in)
    return msgspec.structs.replace(ancestry, inputs=_all_named(ancestry.inputs, contents.inputs), stand_in=stand_in)


def _all_named(inputs: tuple[Ancestor, ...], contents: tuple[InputContents, ...]) -> tuple[Ancestor, ...]:
    """Return inputs with their identities, all of them or none."""
    if [one.reference for one in inputs] != [known.reference for known in contents]:
        return inputs
    return tuple(_named(one, known) for one, known in zip(inputs, contents, strict=True))


def _named(one: Ancestor, known: InputContents) -> Ancestor:
    return msgspec.structs.replace(one, identity=known.identity, inputs=_all_named(one.inputs, known.inputs))


def _without_local(ancestry: Ancestry) -> Ancestry:
    """Return an ancestry as format 1 tells it, without identities that held on the machine of the merge only."""

    def lasting(one: Ancestor) -> Ancestor:
        return msgspec.structs.replace(
            one,
            identity="" if is_local(one.identity) else one.identity,
            inputs=tuple(map(lasting, one.inputs)),
            made_by=None if one.made_by is None else _without_local(one.made_by),
        )

    stand_in = None if ancestry.stand_in is None else lasting(ancestry.stand_in)
    return msgspec.structs.replace(ancestry, inputs=tuple(map(lasting, ancestry.inputs)), stand_in=stand_in)


def as_json(ancestry: Ancestry) -> dict[str, Any]:
    """Return an ancestry as JSON types, without what is empty."""
    content: dict[str, Any] = msgspec.to_builtins(ancestry)
    return content
