"""The recipes of the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.demo.training import Family

_TASK_ARITHMETIC: Final = """\
# The base plus the weighted sum of what the experts learned.
merge_method: task_arithmetic
base_model: {base}
models:
{models}dtype: bfloat16
"""
_TIES: Final = """\
# Keeps the larger half of each delta, elects a sign for each element, and adds up who agrees.
merge_method: ties
base_model: {base}
models:
{models}parameters: {{normalize: false}}
dtype: bfloat16
"""


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """One recipe file of the demo."""

    title: str
    path: Path


def write_recipes(directory: Path, family: Family) -> tuple[DemoRecipe, ...]:
    """Write the recipes into ``directory``; the models are named relative to it."""
    directory.mkdir(parents=True, exist_ok=True)
    recipes = (
        ("task arithmetic", "task-arithmetic.yml", _TASK_ARITHMETIC, "{weight: 0.4}"),
        ("TIES", "ties.yml", _TIES, "{weight: 0.5, density: 0.5}"),
    )
    written: list[DemoRecipe] = []
    for title, name, template, parameters in recipes:
        models = "".join(f"  - model: ../{expert.name}\n    parameters: {parameters}\n" for expert in family.experts)
        path = directory / name
        path.write_text(template.format(base=f"../{family.base.name}", models=models), encoding="utf-8")
        written.append(DemoRecipe(title, path))
    return tuple(written)
