"""Where and with what a benchmark runs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.families import Family, make_family
from bench.processes import environment
from bench.recipes import write_recipe

TINY: Final = 2**20
"""Bytes of models whose merge takes no time: what is left is the start of a program."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: numbers of experts, budgets in percent, variants of a recipe, and methods.

    ``main`` is the number of experts wherever one number is enough, ``counts`` those of the comparison of all methods,
    ``sweep`` those under one budget, ``budgeted`` the number of experts that all ``budgets`` are tried with. ``few``
    are the methods that cores and mounts are measured with.
    """

    main: int = 4
    counts: tuple[int, ...] = (2, 4, 8)
    sweep: tuple[int, ...] = (2, 4, 8, 12, 16)
    budgeted: int = 8
    budgets: tuple[int, ...] = (100, 50, 25, 10, 5, 1)
    variants: int = 10
    few: tuple[str, ...] = ("ties", "linear")
    methods: tuple[str, ...] = ("linear", "task_arithmetic", "ties", "slerp", "model_stock", "dare_ties", "della")


SMOKE: Final = Extent(
    main=2,
    counts=(2,),
    sweep=(2, 3),
    budgeted=2,
    budgets=(100, 10),
    variants=2,
    few=("ties",),
    methods=("ties", "linear"),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a benchmark keeps what it makes, the bytes of its models, large and small, and the threads it may use."""

    work: Path
    large: int
    small: int
    threads: int
    extent: Extent

    def family(self, size: int, experts: int) -> Family:
        """Return a family of models of ``size`` bytes each, made once and kept."""
        return make_family(self.work / "families", size, experts)

    def recipe(self, method: str, family: Family, change: float = 0.0) -> Path:
        """Return a recipe that merges all experts of a family."""
        return write_recipe(self.work / "recipes", method, family, change)

    def scratch(self, row: str) -> Path:
        """Return a directory for what a row writes; it is empty."""
        directory = self.work / "scratch" / row
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        return directory

    def variables(self, catalog: Path | None = None) -> dict[str, str]:
        """Return the environment of programs; ``catalog`` is where mergefs keeps what it knows."""
        chosen = {} if catalog is None else {"MERGEFS_CATALOG": str(catalog)}
        return environment(self.work) | chosen

    def processors(self, count: int) -> tuple[int, ...]:
        """Return ``count`` of the processors that this process may use, or all where there are no more."""
        return tuple(sorted(os.sched_getaffinity(0))[:count])


def named(size: int) -> str:
    """Return a size as it stands in the names of rows: 1GiB, 150MB."""
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "KiB": 2**10}
    return next((f"{size // unit}{name}" for name, unit in units.items() if size % unit == 0), f"{size}B")
