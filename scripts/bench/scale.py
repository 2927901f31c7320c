"""What the size of models costs where nothing is merged: planning, mounting and the catalog of 405 B parameters."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.made_statistics import fill_catalog
from bench.mounting import Mount
from bench.processes import Taken, environment, measured, timed
from bench.programs import MERGEFS
from bench.shapes import Shape
from bench.sparse import write_sparse_family
from mergefs.units import format_size

BUDGET: Final = "25%"


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured: each round's value, and what it should stay below (None: only stated).

    Values are seconds, or bytes where ``is_memory``.
    """

    name: str
    values: tuple[float, ...]
    target: float | None
    is_memory: bool = False

    @property
    def worst(self) -> float:
        """The largest value: of memory, and of anything that has to stay below something."""
        return max(self.values)

    def shown(self, value: float) -> str:
        """Return a value for people."""
        return format_size(int(value)) if self.is_memory else f"{value:.2f} s"


class Family:
    """A family of sparse models with made-up statistics, kept in a directory for the next run."""

    def __init__(self, directory: Path, shape: Shape, experts: int) -> None:
        self.directory = directory / f"sparse-{shape.parameters}-{experts}"
        self.catalog = self.directory / "catalog"
        self.variables = environment(self.directory) | {"MERGEFS_CATALOG": str(self.catalog)}
        self.recipe = self.directory / "ties.yml"
        if not (self.directory / "complete").exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            write_sparse_family(self.directory, shape, experts)
            fill_catalog(self.recipe, self.catalog)
            (self.directory / "complete").touch()

    def linear_recipe(self, number: int) -> Path:
        """Return a recipe of task_arithmetic, whose weights no other number has: its plan is not known yet.

        Under a budget its errors follow from statistics; those of ties are measured on blocks, which hold nothing here.
        """
        document: dict[str, Any] = json.loads(self.recipe.read_text()) | {"merge_method": "task_arithmetic"}
        for position, entry in enumerate(document["models"]):
            entry["parameters"] = {"weight": 0.3 + position / 20 + (number + os.getpid()) / 10**6}
        path = self.directory / f"task-arithmetic-{number}.yml"
        path.write_text(json.dumps(document))
        return path


def measure_scale(family: Family, repeat: int, options: Sequence[str]) -> list[Figure]:
    """Mount a merge of known models without a budget, plan it within one, and mount that plan; by turns."""
    found: dict[str, list[float]] = {}
    mountpoint = family.directory / "mnt"
    mountpoint.mkdir(exist_ok=True)

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def mount(what: str, target: str | Path) -> None:
        note(f"mount {what}: ready", timed([*MERGEFS, "mount", target, mountpoint], family.variables))
        try:
            server = Mount(mountpoint, family.variables)
            list(mountpoint.iterdir())
            for path in mountpoint.iterdir():
                path.stat()
            note(f"mount {what}: most memory of the server", server.peak_bytes())
        finally:
            timed([*MERGEFS, "umount", mountpoint], family.variables)

    for turn in range(repeat + 1):
        if turn == 1:
            found.clear()  # the first round compiles, and fills the page cache
        mount("without a budget", family.recipe)
        planned = _plan(family, turn, options)
        note("plan within a budget", planned.seconds)
        note("plan within a budget: most memory", planned.peak_bytes)
        mount("within a budget", json.loads(planned.output)["plan_id"])
    note("catalog", sum(path.stat().st_blocks * 512 for path in family.catalog.rglob("*") if path.is_file()))
    targets = {
        "mount without a budget: ready": 2.0,
        "mount without a budget: most memory of the server": 500 * 10**6,
        "mount within a budget: most memory of the server": 500 * 10**6,
        "plan within a budget": 60.0,
        "plan within a budget: most memory": 2 * 2**30,
    }
    return [
        Figure(name, tuple(values), targets.get(name), "memory" in name or name == "catalog")
        for name, values in found.items()
    ]


def _plan(family: Family, turn: int, options: Sequence[str]) -> Taken:
    """Plan a merge within a budget that nobody has planned before."""
    command = [*MERGEFS, "plan", family.linear_recipe(turn), "--budget", BUDGET, "--json", *options]
    return measured(command, family.variables)
