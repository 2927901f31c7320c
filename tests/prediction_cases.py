"""Random small families, recipes and budgets, and what a budget really changes of a merge."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from recipes import write_document
from safetensors.torch import save_file

from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.kernels.precision import load
from mergefs.planes.analysis import analyze_planes
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.planner.plan import BudgetOutcome, MergePlan
from mergefs.planner.planes import delta_tasks
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources.ledger import Purpose

BLOCK_ELEMENTS: Final = 256
"""Elements of a block, for ``mergefs.sources.blocks.BLOCK_ELEMENTS``: these families have some forty blocks each."""

SHAPES: Final = {
    "model.embed.weight": (60, 24),
    "model.layers.0.up.weight": (64, 32),
    "model.layers.0.down.weight": (33, 40),
    "model.layers.0.norm.weight": (40,),
    "model.layers.0.mixer.weight": (12, 10, 8),
}
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
_KINDS: Final = ("independent", "correlated", "cancelling", "identical", "partly frozen")

Generator = np.random.Generator
Tensors = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


@dataclass(frozen=True, slots=True)
class RandomFamily:
    """A base, experts of some kinds, the recipe's dtypes, and how large deltas are beside the base."""

    base: Path
    experts: tuple[Path, ...]
    kinds: tuple[str, ...]
    dtype: str | None
    out_dtype: str | None
    size: float


@dataclass(frozen=True, slots=True)
class Method:
    """How random recipes of one method look: how many experts, and the parameters of each and of all."""

    name: str
    fewest: int = 1
    most: int = 4
    base: bool = True
    own: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shared: Mapping[str, tuple[float, float] | tuple[bool, ...]] = field(default_factory=dict)


_WEIGHT: Final = {"weight": (-0.3, 1.0)}
_POSITIVE: Final = {"weight": (0.1, 1.0)}
_DENSITY: Final = {"density": (0.25, 0.8)}
METHODS: Final = (
    Method("linear", base=False, own=_POSITIVE, shared={"normalize": (True, False)}),
    Method("linear", own=_POSITIVE, shared={"normalize": (True, False)}),
    Method("task_arithmetic", own=_WEIGHT, shared={"lambda": (0.3, 1.2)}),
    Method("task_arithmetic", own=_POSITIVE, shared={"normalize": (True, False)}),
    Method("dare_linear", own={**_POSITIVE, **_DENSITY}, shared={"rescale": (True, False)}),
    Method("slerp", most=1, shared={"t": (0.1, 0.9)}),
    Method("nuslerp", 2, 2, own=_POSITIVE, shared={"nuslerp_flatten": (True,)}),
    Method("multislerp", 2, own=_POSITIVE),
    Method("karcher", 2, base=False),
    Method("model_stock", 2),
    Method("passthrough", most=1, base=False, own={"scale": (0.5, 1.5)}),
    Method("breadcrumbs", own={**_POSITIVE, **_DENSITY, "gamma": (0.0, 0.1)}),
    Method("della_linear", own={**_POSITIVE, **_DENSITY, "epsilon": (0.01, 0.15)}),
    Method("ties", own={**_POSITIVE, **_DENSITY}, shared={"normalize": (True, False)}),
    Method("dare_ties", own={**_POSITIVE, **_DENSITY}),
    Method("della", own={**_POSITIVE, **_DENSITY, "epsilon": (0.01, 0.15)}),
    Method("sce", 2, shared={"select_topk": (0.2, 1.0)}),
    Method("ram"),
    Method("nearswap", most=1, shared={"t": (0.0001, 0.01)}),
    Method("arcee_fusion", most=1),
    Method("nuslerp", 2, 2, own=_POSITIVE),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan said of a budget, and what was measured: norms of the change and of the merged delta."""

    method: str
    recipe: Path
    base: str | None
    predicted: BudgetOutcome
    error: float
    merged: float

    @property
    def relative_error(self) -> float:
        """The measured error, relative to the merged delta."""
        return self.error / self.merged if self.merged else 0.0


def write_family(directory: Path, generator: Generator) -> RandomFamily:
    """Write a random family below ``directory``."""
    kinds = tuple(generator.choice(_KINDS, 4))
    size = 10 ** generator.uniform(-2.2, -0.5)
    base: Tensors = {name: 0.05 * generator.standard_normal(shape) for name, shape in SHAPES.items()}
    dtype = _DTYPES[generator.integers(3)]
    mixed = generator.random() < 0.4
    directory.mkdir(parents=True)
    experts: list[Path] = []
    deltas: list[Tensors] = []
    for number, kind in enumerate(kinds):
        deltas.append(_delta(kind, deltas, size, generator))
        tensors = {name: values + deltas[-1][name] for name, values in base.items()}
        own = _DTYPES[generator.integers(3)] if mixed else dtype
        experts.append(_write(directory / f"expert-{number}", tensors, own))
    computes = (None, "bfloat16", "float32", "float16")
    chosen = computes[generator.integers(4)] if mixed else None
    out = "bfloat16" if chosen == "float32" and generator.random() < 0.5 else None
    return RandomFamily(_write(directory / "base", base, dtype), tuple(experts), kinds, chosen, out, size)


def _delta(kind: str, before: Sequence[Tensors], size: float, generator: Generator) -> Tensors:
    """Return what an expert adds to the base; some tensors change more than others."""
    scales = {name: 0.05 * size * 10 ** generator.uniform(-0.5, 0.5) for name in SHAPES}
    own: Tensors = {name: scales[name] * generator.standard_normal(shape) for name, shape in SHAPES.items()}
    if kind == "partly frozen":
        return {name: values * (generator.random() < 0.5) for name, values in own.items()}
    if kind == "independent" or not before:
        return own
    other = before[generator.integers(len(before))]
    share = {"identical": 1.0, "correlated": 0.8, "cancelling": -0.9}[kind]
    rest = 0.0 if kind == "identical" else math.sqrt(1 - share**2)
    return {name: share * other[name] + rest * values for name, values in own.items()}


def _write(directory: Path, tensors: Tensors, dtype: torch.dtype) -> Path:
    directory.mkdir()
    save_file(
        {name: torch.from_numpy(values).to(dtype) for name, values in tensors.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text("{}")
    return directory


def write_random_recipe(path: Path, method: Method, family: RandomFamily, generator: Generator) -> Path:
    """Write a random recipe of ``method`` for some experts of ``family``."""
    count = int(generator.integers(method.fewest, method.most + 1))
    experts = generator.permutation(len(family.experts))[:count]
    document: dict[str, Any] = {
        "merge_method": method.name,
        "models": [
            {
                "model": str(family.experts[expert]),
                "parameters": {name: float(generator.uniform(*bounds)) for name, bounds in method.own.items()},
            }
            for expert in experts
        ],
        "parameters": {name: _chosen(options, generator) for name, options in method.shared.items()},
    }
    if method.base:
        document["base_model"] = str(family.base)
        if method.name == "linear":
            document["models"].append({"model": str(family.base), "parameters": {"weight": 0.5}})
    document |= {key: name for key, name in (("dtype", family.dtype), ("out_dtype", family.out_dtype)) if name}
    return write_document(path, document)


def _chosen(options: tuple[float, float] | tuple[bool, ...], generator: Generator) -> float | bool:
    if isinstance(options[0], bool):
        return bool(options[generator.integers(len(options))])
    return float(generator.uniform(*options))


def measured(recipe: Path, budget: str, base: str | None, workspace: Workspace) -> Outcome:
    """Plan a budget, merge with it and without one, and return what was said and what is so."""
    loaded = load_recipe(recipe)
    plan = make_plan(loaded, PlanOptions(budget, base), workspace)
    full = make_plan(loaded, PlanOptions(None, base), workspace)
    error, merged = differences(plan, full, workspace)
    return Outcome(loaded.method, recipe, base, plan.outcome, error, merged)


def differences(plan: MergePlan, full: MergePlan, workspace: Workspace) -> tuple[float, float]:
    """Return the norms of (budgeted merge - full merge) and of (full merge - base)."""
    engines = [Engine(one, workspace, strict=False) for one in (plan, full)]
    error = merged = 0.0
    for name, tensor in plan.tensors.items():
        ours, theirs = (
            load(engine.read_tensor(name, 0, tensor.nbytes), tensor.dtype, tensor.dtype).astype(np.longdouble)
            for engine in engines
        )
        place = tensor.stand_in
        assert place is not None
        raw = place.read(workspace.reader, 0, place.elements, Purpose.ANALYSIS)
        base = load(raw, place.dtype, tensor.compute).astype(np.longdouble)
        error += float(((ours - theirs) ** 2).sum())
        merged += float(((theirs - base) ** 2).sum())
    return math.sqrt(error), math.sqrt(merged)


def keep_planes(recipe: Path, base: str | None, planes: int, workspace: Workspace) -> None:
    """Analyse the models of a recipe, and keep their deltas in planes too."""
    draft = draft_plan(load_recipe(recipe), PlanOptions(None, base), workspace)
    analyze_draft(draft, workspace, Silence())
    tasks = delta_tasks(draft.tensors, draft.sources, planes)
    analyze_planes(tasks, workspace.catalog, workspace.reader, Silence())


def random_outcomes(directory: Path, workspace: Workspace, count: int, seed: int, planes: int = 0) -> Iterator[Outcome]:
    """Yield the outcomes of random pairs of a recipe and a budget, an odd number of bytes.

    Each family has five recipes, and each recipe two budgets; deltas are kept in ``planes`` where there are to be some.
    """
    generator = np.random.default_rng(seed)
    for number in range(count // 2):
        if number % 5 == 0:
            family = write_family(directory / f"family-{number // 5}", generator)
        method = METHODS[number % len(METHODS)]
        recipe = write_random_recipe(directory / f"{number}.yml", method, family, generator)
        base = None if method.base else str(family.base)
        if planes:
            keep_planes(recipe, base, planes, workspace)
        total = make_plan(load_recipe(recipe), PlanOptions(None, base), workspace).outcome.expert_bytes_total
        for _ in range(2):
            yield measured(recipe, str(int(generator.integers(0, total))), base, workspace)


def describe(outcome: Outcome) -> str:
    """Return a recipe with what was said and what is so, for who has to find out why."""
    document = json.loads(outcome.recipe.read_text())
    return f"{outcome.predicted} but {outcome.error} of {outcome.merged} with base {outcome.base} for {document}"
