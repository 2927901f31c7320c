"""The recipes that are measured: ordinary settings of each method, the same file for mergefs and for mergekit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.families import Family

DENSITY: Final = 0.3
"""Fewer than the elements that an expert has changed, or a density would select nothing."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method with the parameters of each expert and of all, and with how many experts it is measured."""

    name: str
    per_expert: Mapping[str, float]
    common: Mapping[str, float]
    counts: tuple[int, ...] = (2, 4, 8)


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method("ties", {"weight": 0.5, "density": DENSITY}, {}),
        Method("linear", {"weight": 0.5}, {}),
        Method("task_arithmetic", {"weight": 0.4}, {}),
        Method("dare_ties", {"weight": 0.5, "density": DENSITY}, {}),
        Method("della", {"weight": 0.5, "density": DENSITY, "epsilon": 0.1}, {"lambda": 1.0}),
        Method("model_stock", {}, {}),
        Method("slerp", {}, {"t": 0.4}, (2,)),
    )
}


def document(method: Method, family: Family, change: float = 0.0) -> dict[str, Any]:
    """Return the recipe that merges all experts of a family; ``change`` is added to the weights, for variants."""
    experts = [str(path) for path in family.experts]
    base = experts[0] if method.name == "slerp" else str(family.base)
    models = [{"model": path, "parameters": _parameters(method, number, change)} for number, path in enumerate(experts)]
    made: dict[str, Any] = {"merge_method": method.name, "models": models, "dtype": "bfloat16"}
    if method.name != "linear":
        made["base_model"] = base
    if method.common:
        made["parameters"] = dict(method.common)
    return made


def _parameters(method: Method, number: int, change: float) -> dict[str, float]:
    """Return the parameters of an expert; weights differ, or equal terms would hide mistakes."""
    own = dict(method.per_expert)
    if "weight" in own:
        own["weight"] = round(own["weight"] + 0.05 * number + change, 4)
    return own


def write_recipe(directory: Path, method: str, family: Family, change: float = 0.0) -> Path:
    """Write a recipe and return its path. What is written before is overwritten, with the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{method}-{family.parameters}-k{len(family.experts)}{f'-{change:g}' if change else ''}.yml"
    path.write_text(json.dumps(document(METHODS[method], family, change), indent=2), encoding="utf-8")
    return path
