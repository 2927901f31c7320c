"""Recipes for the families of ``checkpoints``, written as mergekit configs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from checkpoints import Family


@dataclass(frozen=True, slots=True)
class Merge:
    """One way to merge a family: what a recipe says beside its models.

    ``per_expert`` are the parameters of each expert in turn, of which as many take part as there are entries. Without
    ``with_base`` the recipe names no base, and the command line must stand it in.
    """

    method: str
    per_expert: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    with_base: bool = True


def _weights(*weights: float, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": weight, **others} for weight in weights)


# Every method that has experts, with parameters that leave no shortcut: weights differ and do not sum to one.
MERGES: Final[dict[str, Merge]] = {
    "task_arithmetic": Merge("task_arithmetic", _weights(0.6, 0.3), {"lambda": 0.9}),
    "ties": Merge("ties", _weights(0.7, 0.5, density=0.4), {"normalize": True}),
    "dare_linear": Merge("dare_linear", _weights(0.6, 0.3, density=0.5)),
    "dare_ties": Merge("dare_ties", _weights(0.6, 0.5, density=0.5), {"normalize": True}),
    "linear without a base": Merge("linear", _weights(0.6, 0.9), {"normalize": False}, with_base=False),
    "slerp": Merge("slerp", ({},), {"t": 0.4}),
}


def recipe_document(
    merge: Merge, family: Family, dtype: str | None = None, out_dtype: str | None = None
) -> dict[str, Any]:
    """Return the recipe of ``merge`` for ``family`` as a document."""
    models: list[dict[str, Any]] = [
        {"model": str(expert), "parameters": dict(parameters)}
        for expert, parameters in zip(family.experts, merge.per_expert, strict=False)
    ]
    document: dict[str, Any] = {"merge_method": merge.method, "models": models}
    if merge.with_base:
        document["base_model"] = str(family.base)
    if merge.parameters:
        document["parameters"] = dict(merge.parameters)
    return document | {key: name for key, name in (("dtype", dtype), ("out_dtype", out_dtype)) if name is not None}


def write_recipe(
    path: Path, merge: Merge, family: Family, dtype: str | None = None, out_dtype: str | None = None
) -> Path:
    """Write the recipe of ``merge`` for ``family`` to ``path`` and return it."""
    return write_document(path, recipe_document(merge, family, dtype, out_dtype))


def write_document(path: Path, document: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Path:
    """Write ``document``, or several, as a recipe to ``path`` and return it. JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [document] if isinstance(document, Mapping) else document
    path.write_text("\n---\n".join(json.dumps(one, indent=2) for one in documents) + "\n", encoding="utf-8")
    return path


def base_options(merge: Merge, family: Family) -> list[str]:
    """Return what the command line needs beside the recipe when a budget leaves blocks unread."""
    return [] if merge.with_base else ["--base", str(family.base)]


def stand_in(merge: Merge, family: Family) -> str | None:
    """Return the ``base`` that ``mergefs.open`` needs when a budget leaves blocks unread."""
    return None if merge.with_base else str(family.base)


def used_experts(merge: Merge, family: Family) -> Sequence[Path]:
    """Return the experts that take part."""
    return family.experts[: len(merge.per_expert)]
