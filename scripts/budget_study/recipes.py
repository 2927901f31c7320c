"""The merges that are measured, as recipe files for a trained family."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mergefs.demo.training import Family


@dataclass(frozen=True, slots=True)
class Merge:
    """A method with its parameters, the same for each expert.

    Without ``with_base`` the recipe names no base, and the budget's ``--base`` does. ``factor`` tells for ``experts``
    experts what each delta is multiplied by in the merge, None where that differs from element to element.
    """

    method: str
    per_expert: Mapping[str, Any]
    parameters: Mapping[str, Any]
    with_base: bool = True
    weight: float | None = None

    def factor(self, experts: int) -> float | None:
        """Return what each of ``experts`` deltas is multiplied by, None where no one number says it."""
        return 1 / experts if not self.with_base else self.weight


MERGES: Final = (
    Merge("task_arithmetic", {"weight": 0.4}, {}, weight=0.4),
    Merge("linear", {"weight": 1.0}, {}, with_base=False),
    Merge("ties", {"weight": 0.5, "density": 0.5}, {"normalize": False}),
    Merge("dare_ties", {"weight": 0.5, "density": 0.5}, {"normalize": False}),
)
"""``linear`` with its default of weights that add up to one; the others as `mergefs demo` has them."""


def write_recipe(directory: Path, merge: Merge, family: Family) -> Path:
    """Write the recipe of ``merge`` for ``family`` into ``directory`` and return its path."""
    document: dict[str, Any] = {
        "merge_method": merge.method,
        "models": [{"model": str(path), "parameters": dict(merge.per_expert)} for path in family.experts],
        "dtype": "bfloat16",
    }
    if merge.with_base:
        document["base_model"] = str(family.base)
    if merge.parameters:
        document["parameters"] = dict(merge.parameters)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{merge.method}.yml"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path
