"""The parity matrix: for every method, recipes that cover all pairs of what can be varied, from its own declaration.

Varied are the kind of family, how many experts there are, what is said of the base, whether the recipe names a dtype,
and every declared parameter (``parity_values``). A new method is in the matrix as soon as it is in the registry.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from architectures import GEMMA, LLAMA, MISTRAL, QWEN2_TIED, Architecture, make_model
from checkpoints import Family, fine_tuned, write_model
from parity_pairwise import Covering, Row, cover
from parity_values import choices
from recipes import write_document

import mergefs
from mergefs.errors import MergefsError
from mergefs.methods.contract import BasePolicy, Scope, Specification
from mergefs.methods.registry import METHODS

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_EXPERTS: Final = 4

# Families -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """A base and four experts of one architecture, all in one dtype.

    ``shards`` are the numbers of files of the base and of each expert in turn. Of an expert whose turn it is, tensors
    with one of the words in ``frozen`` equal the base's.
    """

    architecture: Architecture
    shards: tuple[int, ...] = (1,)
    frozen: tuple[tuple[str, ...], ...] = ((),)


FAMILIES: Final = {
    "Llama": FamilyKind(LLAMA),
    "tied Qwen2": FamilyKind(QWEN2_TIED),
    "Mistral": FamilyKind(MISTRAL),
    "Gemma": FamilyKind(GEMMA),
    "partly frozen Llama": FamilyKind(LLAMA, frozen=(("embed", "mlp"), ("embed", "self_attn"), ("embed", "layers.1."))),
    "sharded Llama": FamilyKind(LLAMA, shards=(3, 1, 2)),
}


def write_family(directory: Path, kind: FamilyKind, dtype: torch.dtype) -> Family:
    """Write a family below ``directory``. A fifth of the elements of every expert are the base's."""
    config, base = make_model(kind.architecture, dtype)
    base_path = write_model(directory / "base", base, config, kind.shards[0])
    paths = []
    for number in range(MOST_EXPERTS):
        words = kind.frozen[number % len(kind.frozen)]
        frozen = [name for name in base if any(word in name for word in words)]
        tensors = fine_tuned(base, dtype, seed=1000 * (number + 1), frozen=frozen)
        shards = kind.shards[(number + 1) % len(kind.shards)]
        paths.append(write_model(directory / f"expert-{number + 1}", tensors, config, shards))
    return Family(base_path, tuple(paths))


Families = Callable[[str, str], Family]
"""Returns the family of a name in ``FAMILIES`` in a dtype named in ``DTYPES``."""


def families_below(directory: Path) -> Families:
    """Return a function that writes each family once."""
    return lru_cache(maxsize=None)(partial(_family_below, directory))


def _family_below(directory: Path, family: str, dtype: str) -> Family:
    return write_family(directory / f"{family}-{dtype}", FAMILIES[family], DTYPES[dtype])


# Recipes ------------------------------------------------------------------------------------------------------------

FAMILY, EXPERTS, BASE, DTYPE = "the family", "experts", "the base", "the dtype"
_NO_BASE, _UNLISTED, _LISTED_FIRST, _LISTED_LAST = "none", "not listed", "listed first", "listed last"
_STATED = "stated"
_BASES: Final = {
    BasePolicy.REQUIRED: (_UNLISTED, _LISTED_FIRST),
    BasePolicy.AS_INPUT: (_NO_BASE, _LISTED_LAST, _UNLISTED),
    BasePolicy.OPTIONAL: (_NO_BASE, _UNLISTED, _LISTED_FIRST),
}


def factors(method: Specification) -> dict[str, tuple[str, ...]]:
    """Return everything that is varied for a method, with its values by name."""
    found = {
        FAMILY: tuple(FAMILIES),
        EXPERTS: tuple(str(count) for count in _numbers_of_experts(method)),
        BASE: _bases(method),
        DTYPE: ("left to the models", _STATED),
    }
    return found | {parameter.name: tuple(choices(parameter)) for parameter in method.parameters}


def _bases(method: Specification) -> tuple[str, ...]:
    """Return what can be said of the base: nothing of it where one model is all that the method takes."""
    return (_NO_BASE,) if method.max_models == 1 else _BASES[method.base]


def _numbers_of_experts(method: Specification) -> Iterator[int]:
    """Yield how many experts a recipe may have: first two where it may be two, for most refuse or ignore one."""
    for count in (2, *(number for number in range(1, MOST_EXPERTS + 1) if number != 2)):
        models = {count if base == _NO_BASE else count + 1 for base in _bases(method)}
        enough = any(method.min_models <= number <= (method.max_models or number) for number in models)
        if enough and method.min_experts <= count <= (method.max_experts or count):
            yield count


def recipe_of(method: Specification, row: Row, dtype: str, family: Family) -> dict[str, Any]:
    """Return the recipe that a row of the matrix stands for."""
    base = {"model": str(family.base)}
    experts: list[dict[str, Any]] = [{"model": str(path)} for path in family.experts[: int(row[EXPERTS])]]
    models = {_LISTED_FIRST: [base, *experts], _LISTED_LAST: [*experts, base]}.get(row[BASE], experts)
    document: dict[str, Any] = {"merge_method": method.name, "models": models}
    if row[BASE] != _NO_BASE:
        document["base_model"] = str(family.base)
    if row[DTYPE] == _STATED:
        document["dtype"] = dtype
    for parameter in method.parameters:
        entries = models if parameter.scope is Scope.PER_MODEL else experts
        choices(parameter)[row[parameter.name]].write(parameter.name, document, entries)
    return document


def refusal(document: dict[str, Any], directory: Path) -> str | None:
    """Return the sentence by which mergefs refuses a recipe, or None when it plans it."""
    try:
        mergefs.open(write_document(directory / "recipe.yml", document)).close()
    except MergefsError as error:
        return str(error)
    return None


def matrix(name: str, families: Families, directory: Path) -> Covering:
    """Return the rows of a method's matrix: all pairs that are together in any recipe that mergefs accepts.

    The rows do not depend on the dtype.
    """
    method = METHODS[name].specification

    def allowed(row: Row) -> bool:
        return refusal(recipe_of(method, row, "bfloat16", families(row[FAMILY], "bfloat16")), directory) is None

    return cover(factors(method), allowed)
