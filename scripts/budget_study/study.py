"""The study: every strategy, method and budget on every family, each measured once and remembered."""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Final

from blake3 import blake3

from budget_study.bound import Rows, least_squared_error
from budget_study.families import FamilyKind, TrainedFamily, train
from budget_study.granularity import BYTES_PER_ELEMENT, error_of_largest_rows
from budget_study.measuring import (
    Measured,
    Tensors,
    Yardstick,
    geometric_mean,
    measure,
    perplexities_of,
    perplexities_of_served,
    served_tensors,
    stored_tensors,
)
from budget_study.recipes import Merge, write_recipe
from budget_study.results import Analysis, FamilyFigures, Figures, Memory, MethodFigures
from budget_study.rules import Rule, coin_flip, largest_norm, spend_by
from mergefs.api import MergedModel
from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.planner.budget import parse_budget
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.identity import bought_digest
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe

PLANES: Final = 8
"""Planes that the experts are analysed with for the strategy that uses them."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to spend a budget: the planner's own, or by rules.

    Of several rules the mean error is reported, and the perplexity of the first.
    """

    name: str
    title: str
    rules: tuple[Rule, ...] = ()
    planes: bool = False


STRATEGIES: Final = (
    Strategy("coin", "coin flip (error: mean of three)", tuple(coin_flip(seed) for seed in range(3))),
    Strategy("norm", "largest norm", (largest_norm,)),
    Strategy("planner", "planner, no planes"),
    Strategy("planes", "planner, planes", planes=True),
)

Say = Callable[[str], None]


def run_study(
    directory: Path, kinds: Sequence[FamilyKind], budgets: Sequence[str], merges: Sequence[Merge], say: Say
) -> list[FamilyFigures]:
    """Train the families below ``directory``, measure what is not known there yet, and return everything."""
    found = []
    for kind in kinds:
        place = directory / kind.name
        place.mkdir(parents=True, exist_ok=True)
        family = train(kind, place / "models", say)
        found.append(FamilyStudy(family, place, say).figures(budgets, merges))
    return found


class FamilyStudy:
    """Measures one family below ``place``, with two catalogs: one without planes and one with them."""

    def __init__(self, family: TrainedFamily, place: Path, say: Say) -> None:
        self.family = family
        self.say = say
        self.memory = Memory(place / "results.json")
        record = (family.models.base.parent / "family.json").read_bytes()
        self.identity = blake3(record).hexdigest(length=8)
        self._place = place

    def figures(self, budgets: Sequence[str], merges: Sequence[Merge]) -> FamilyFigures:
        """Return everything."""
        models = self.family.models
        studies = [MethodStudy(self, merge, write_recipe(self._place / "recipes", merge, models)) for merge in merges]
        seconds = [self._analyse(studies, planes) for planes in (False, True)]
        experts = [
            self._perplexities(expert)[number] for number, expert in enumerate(models.experts)
        ]  # experts are in the order of the domains
        base = stored_tensors(models.base)
        return FamilyFigures(
            family=self.family,
            parameters=sum(tensor.size for tensor in base.values()),
            base_perplexity=geometric_mean(self._perplexities(models.base)),
            experts_perplexity=geometric_mean(experts),
            analysis=Analysis(*seconds, *self._sizes()),
            methods=tuple(study.figures(budgets) for study in studies),
        )

    def catalog(self, planes: bool) -> Path:
        """Return the catalog for plans with or without planes."""
        return self._place / ("catalog-with-planes" if planes else "catalog")

    def _analyse(self, studies: Sequence["MethodStudy"], planes: bool) -> float:
        """Analyse all recipes in processes of their own, so that plans only read; return the seconds of the first."""
        taken = []
        for study in studies:
            command = [sys.executable, "-m", "mergefs", "--catalog", str(self.catalog(planes)), "analyze"]
            options = ["--planes", str(PLANES)] if planes else []
            options += ["--base", study.options.base] if study.options.base else []
            start = time.monotonic()
            subprocess.run([*command, *options, str(study.recipe)], check=True, stdout=subprocess.DEVNULL)
            taken.append(time.monotonic() - start)
        name = "analysis with planes" if planes else "analysis"
        return float(self.memory.recall(name, self.identity, lambda: taken[0]))

    def _sizes(self) -> tuple[int, int]:
        """Return the bytes of all experts' weights and of their planes."""
        experts = [file for expert in self.family.models.experts for file in expert.glob("*.safetensors")]
        planes = (self.catalog(planes=True) / "planes").iterdir()
        return sum(file.stat().st_size for file in experts), sum(file.stat().st_size for file in planes)

    def _perplexities(self, model: Path) -> list[float]:
        """Return the perplexities of a model of the family."""
        name = f"perplexity of {model.name}"
        return list(self.memory.recall(name, self.identity, lambda: perplexities_of(model, self.family)))


class MethodStudy:
    """Measures one method on one family."""

    def __init__(self, study: FamilyStudy, merge: Merge, recipe: Path) -> None:
        self.recipe = recipe
        self.options = PlanOptions(base=None if merge.with_base else str(study.family.models.base))
        self._study = study
        self._merge = merge
        self._about = f"{study.identity} {recipe.read_text(encoding='utf-8')}"

    def figures(self, budgets: Sequence[str]) -> MethodFigures:
        """Return the figures of every strategy at every budget."""
        whole = self._study.memory.recall(self._name("whole"), self._about, self._whole_perplexity)
        return MethodFigures(
            merge=self._merge,
            strategies={s.name: tuple(self._strategy(s, budget) for budget in budgets) for s in STRATEGIES},
            single_rows=tuple(self._single_rows(budget) for budget in budgets),
            bounds=tuple(self._bound(budget) for budget in budgets),
            whole_perplexity=float(whole),
        )

    def _name(self, *parts: str) -> str:
        return "/".join((self._merge.method, *parts))

    @contextmanager
    def _plan(self, budget: str | None, planes: bool = False) -> Iterator[tuple[MergePlan, Workspace]]:
        """Lend a plan of the planner's own, and a fresh workspace to compute it in."""
        options = PlanOptions(budget, self.options.base)
        workspace = Workspace.create(Catalog(self._study.catalog(planes)))
        try:
            yield make_plan(load_recipe(self.recipe), options, workspace), workspace
        finally:
            workspace.close()

    @cached_property
    def _yardstick(self) -> Yardstick:
        """What every budgeted merge is held against."""
        with self._plan(None) as (plan, workspace):
            whole = served_tensors(MergedModel(plan, workspace))
        return Yardstick(stored_tensors(self._study.family.models.base), whole)

    def _whole_perplexity(self) -> float:
        """Return the perplexity of the merge that reads everything."""
        with self._plan(None) as (plan, workspace):
            return geometric_mean(perplexities_of_served(MergedModel(plan, workspace), self._study.family))

    def _strategy(self, strategy: Strategy, budget: str) -> Figures:
        """Return the figures of one strategy at one budget: the mean over its rules, if it has several."""
        rules = strategy.rules or (None,)
        found = [self._measure(strategy, number, rule, budget) for number, rule in enumerate(rules)]
        return Figures(fmean(measured.error for measured in found), geometric_mean(found[0].perplexities))

    def _measure(self, strategy: Strategy, number: int, rule: Rule | None, budget: str) -> Measured:
        """Plan, and measure the plan unless what it buys has been measured before."""
        name = self._name(strategy.name, budget, str(number))
        with self._plan(budget, strategy.planes) as (plan, workspace):
            if rule is not None:
                plan = spend_by(rule, plan, workspace.catalog)
            hasher = blake3(self._about.encode())
            for tensor in plan.tensors.values():
                hasher.update(tensor.name.encode() + b"\0" + bought_digest(tensor))

            def compute() -> dict[str, object]:
                start = time.monotonic()
                family = None if number else self._study.family
                measured = measure(MergedModel(plan, workspace), self._yardstick, family)
                took = time.monotonic() - start
                self._study.say(f"{self._study.family.kind.name}/{name}: error {measured.error:.4f} ({took:.0f} s)")
                return asdict(measured)

            measured = Measured(**self._study.memory.recall(name, hasher.hexdigest(length=8), compute))
            limit = parse_budget(budget).limit(plan.outcome.expert_bytes_total)
        if measured.read != measured.planned or measured.read > limit:
            raise RuntimeError(f"{name}: {measured.read} bytes were read, {measured.planned} planned, {limit} allowed")
        return measured

    @cached_property
    def _contributions(self) -> list[Tensors] | None:
        """What each expert adds to the merge; None where that is not its delta times a number."""
        base = self._yardstick.base
        experts = [stored_tensors(expert) for expert in self._study.family.models.experts]
        factor = self._merge.factor(len(experts))
        if factor is None:
            return None
        return [{name: factor * (expert[name] - base[name]) for name in base} for expert in experts]

    def _bytes(self, budget: str) -> int:
        """Return what a budget allows of all experts' bytes."""
        elements = sum(tensor.size for tensor in self._yardstick.base.values())
        return parse_budget(budget).limit(BYTES_PER_ELEMENT * elements * len(self._study.family.models.experts))

    def _bound(self, budget: str) -> float:
        """Return the rate-distortion bound, as an error relative to the whole merge's delta."""

        def compute() -> float:
            base, whole = self._yardstick.base, self._yardstick.whole
            described = self._contributions or [{name: whole[name] - base[name] for name in base}]
            left = least_squared_error(Rows.of(described), 8 * self._bytes(budget))
            return math.sqrt(left) / self._yardstick.delta_norm

        return float(self._study.memory.recall(self._name("bound", budget), self._about, compute))

    def _single_rows(self, budget: str) -> float | None:
        """Return what the largest rows, bought one by one, would leave; None where that cannot be added up."""

        def compute() -> float | None:
            contributions = self._contributions
            if contributions is None:
                return None
            return error_of_largest_rows(contributions, self._bytes(budget)) / self._yardstick.delta_norm

        left = self._study.memory.recall(self._name("single rows", budget), self._about, compute)
        return None if left is None else float(left)
