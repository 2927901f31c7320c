"""What the study finds, and the memory that lets it go on where it was interrupted."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budget_study.families import TrainedFamily
from budget_study.recipes import Merge


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one strategy at one budget: relative error and perplexity."""

    error: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """One method on one family: for each strategy, by name, figures for each budget; and two errors to compare with.

    ``single_rows`` is what would be left if rows could be bought, None where the method is not linear, ``bounds`` the
    rate-distortion bound.
    """

    merge: Merge
    strategies: dict[str, tuple[Figures, ...]]
    single_rows: tuple[float | None, ...]
    bounds: tuple[float, ...]
    whole_perplexity: float


@dataclass(frozen=True, slots=True)
class Analysis:
    """What analysing a family takes: seconds without and with planes, bytes of all experts and of their planes."""

    seconds: float
    seconds_with_planes: float
    expert_bytes: int
    planes_bytes: int


@dataclass(frozen=True, slots=True)
class FamilyFigures:
    """One family. Perplexities are means over the domains; of experts, each on its own domain."""

    family: TrainedFamily
    parameters: int
    base_perplexity: float
    experts_perplexity: float
    analysis: Analysis
    methods: tuple[MethodFigures, ...]


class Memory:
    """JSON values by name in a file, each with what it was measured of: with another ``about`` it is not found."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def recall(self, name: str, about: str, compute: Callable[[], Any]) -> Any:
        """Return the value that is kept, or compute it and keep it at once."""
        kept = self._kept.get(name)
        if kept is None or kept["about"] != about:
            kept = self._kept[name] = {"about": about, "value": compute()}
            unfinished = self._path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self._path)
        return kept["value"]
