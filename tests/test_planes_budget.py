"""Budgets that buy planes: what is served, what it costs, and how far it is from the whole merge."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, write_model
from numpy.typing import NDArray
from recipes import Merge, write_recipe

from mergefs.catalog import Catalog
from mergefs.engine.compute import run_kernel
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.errors import SourceChangedError
from mergefs.kernels.precision import Raw, load
from mergefs.planes.analysis import analyze_planes
from mergefs.planes.coded import CodedDelta
from mergefs.planes.files import planes_directory
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.planner.planes import delta_tasks
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Role

WEIGHTED = {
    "task_arithmetic": Merge("task_arithmetic", ({"weight": 0.7}, {"weight": 0.4})),
    "ties": Merge("ties", ({"weight": 0.7, "density": 0.6}, {"weight": 0.4, "density": 0.3})),
}
SHAPES = {"model.embed_tokens.weight": (300, 128), "model.layers.0.w.weight": (64, 512), "model.norm.weight": (128,)}


@dataclass(frozen=True, slots=True)
class Merges:
    """A family in a catalog, and a way to plan its merges."""

    models: Family
    directory: Path
    workspace: Workspace

    def recipe(self, method: str, dtype: str | None = None) -> Path:
        return write_recipe(self.directory / f"{method}-{dtype}.yml", WEIGHTED[method], self.models, dtype)

    def analyze(self, path: Path, planes: int) -> None:
        draft = draft_plan(load_recipe(path), PlanOptions(), self.workspace)
        analyze_draft(draft, self.workspace, Silence())
        tasks = delta_tasks(draft.tensors, draft.sources, planes)
        analyze_planes(tasks, self.workspace.catalog, self.workspace.reader, Silence())

    def plan(self, path: Path, budget: str | None = None) -> MergePlan:
        return make_plan(load_recipe(path), PlanOptions(budget=budget), self.workspace)

    def values(self, plan: MergePlan) -> dict[str, NDArray[np.float64]]:
        """Return all values of a merge, computed by an engine with a cache of its own."""
        engine = Engine(plan, Workspace.create(self.workspace.catalog), strict=False)
        return {
            name: load(engine.read_tensor(name, 0, tensor.nbytes), tensor.dtype, tensor.dtype).astype(np.float64)
            for name, tensor in plan.tensors.items()
        }

    def error(self, plan: MergePlan, whole: MergePlan) -> float:
        """Return how far a merge is from the whole one, relative to how far that is from the base."""
        found, full = self.values(plan), self.values(whole)
        missing = sum(float(((found[name] - full[name]) ** 2).sum()) for name in full)
        delta = 0.0
        for name, tensor in whole.tensors.items():
            assert tensor.stand_in is not None
            raw = tensor.stand_in.read(self.workspace.reader, 0, tensor.stand_in.elements, Purpose.BASE)
            delta += float(((full[name] - load(raw, tensor.stand_in.dtype, tensor.dtype)) ** 2).sum())
        return float(np.sqrt(missing / delta))


@pytest.fixture
def merges(tmp_path: Path) -> Iterator[Merges]:
    generator = torch.Generator().manual_seed(23)

    def model(name: str, values: dict[str, torch.Tensor]) -> Path:
        return write_model(tmp_path / name, {key: tensor.bfloat16() for key, tensor in values.items()}, {})

    base = {name: torch.randn(shape, generator=generator) / 20 for name, shape in SHAPES.items()}
    experts = [
        {name: tensor + torch.randn(tensor.shape, generator=generator) / 200 for name, tensor in base.items()}
        for _ in range(2)
    ]
    paths = tuple(model(f"expert-{number}", values) for number, values in enumerate(experts))
    family = Family(model("base", base), paths)
    with Catalog(tmp_path / "catalog") as catalog:
        yield Merges(family, tmp_path, Workspace.create(catalog))


def bought_levels(tensor: TensorPlan) -> set[int]:
    return set() if tensor.selection is None else {int(level) for level in np.unique(tensor.selection.levels)}


@pytest.mark.parametrize("budget", ["4%", "6.25%", "25%", "60%"])
def test_planes_bring_a_merge_nearer_for_the_same_bytes_and_no_byte_more_is_read(merges: Merges, budget: str) -> None:
    path = merges.recipe("task_arithmetic")
    whole = merges.plan(path)
    without = merges.error(merges.plan(path, budget), whole)
    merges.analyze(path, 4)
    plan = merges.plan(path, budget)
    workspace = Workspace.create(merges.workspace.catalog)
    engine = Engine(plan, workspace, strict=False)
    for name, tensor in plan.tensors.items():
        engine.read_tensor(name, 0, tensor.nbytes)
    read = workspace.ledger.totals().expert_bytes_read
    assert read == plan.outcome.expert_bytes_planned
    assert plan.outcome.budget_bytes is not None
    assert read <= plan.outcome.budget_bytes
    error = merges.error(plan, whole)
    assert error < 0.8 * without
    assert error == pytest.approx(plan.outcome.predicted_relative_error, rel=0.15)


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "float64"])
@pytest.mark.parametrize("method", WEIGHTED)
def test_what_is_served_is_the_merge_of_what_was_bought(merges: Merges, method: str, dtype: str | None) -> None:
    path = merges.recipe(method, dtype)
    merges.analyze(path, 3)
    plan = merges.plan(path, "20%")
    reader = merges.workspace.reader
    seen = set()
    engine = Engine(plan, merges.workspace, strict=False)
    for name, tensor in plan.tensors.items():
        seen |= bought_levels(tensor)
        if tensor.selection is None or tensor.method is None or tensor.context is None or tensor.stand_in is None:
            continue
        raw = tensor.stand_in.read(reader, 0, tensor.stand_in.elements, Purpose.BASE)
        base = converted(raw, tensor.stand_in.dtype.name, tensor)
        inputs = []
        for index, (place, role) in enumerate(zip(tensor.places, tensor.roles, strict=True)):
            values = base.copy()
            for cell, (start, stop) in enumerate(tensor.selection.cells):
                cut = slice(start * tensor.compute.itemsize, stop * tensor.compute.itemsize)
                level = int(tensor.selection.levels[index, cell])
                coded = tensor.coded[index] if tensor.coded else None
                if level == WHOLE or role is Role.BASE:
                    values[cut] = converted(place.read(reader, start, stop, Purpose.ANALYSIS), place.dtype.name, tensor)
                elif level not in (NOTHING, EQUAL):
                    assert isinstance(coded, CodedDelta)
                    cells = range(cell, cell + 1)
                    values[cut] = coded.decode(reader, base[cut], cells, level, Purpose.ANALYSIS)
            inputs.append((values, tensor.compute))
        answers = merges.workspace.statistics.all_answers(tensor.method, tensor.context, tensor.places)
        coefficients = tensor.method.coefficients(tensor.context, answers)
        merged = run_kernel(tensor.method, coefficients, tuple(inputs), tensor.compute, tensor.dtype, 0)
        assert tensor.selection.computed.all()
        assert np.array_equal(engine.read_tensor(name, 0, tensor.nbytes), merged)
    assert seen & {1, 2, 3}


def converted(raw: Raw, stored: str, tensor: TensorPlan) -> Raw:
    """Return bytes of a stored dtype as those of the compute dtype."""
    from mergefs.checkpoint.dtypes import DTYPES
    from mergefs.kernels.precision import store

    return store(load(raw, DTYPES[stored], tensor.compute), tensor.compute, tensor.compute)


def test_more_planes_make_another_plan_and_the_same_planes_the_same(merges: Merges) -> None:
    path = merges.recipe("task_arithmetic")
    merges.analyze(path, 2)
    first = merges.plan(path, "30%")
    assert merges.plan(path, "30%").plan_id == first.plan_id
    merges.analyze(path, 2)
    assert merges.plan(path, "30%").plan_id == first.plan_id
    merges.analyze(path, 5)
    assert merges.plan(path, "30%").plan_id != first.plan_id


def test_everything_is_read_from_the_experts_themselves_at_a_full_budget(merges: Merges) -> None:
    path = merges.recipe("task_arithmetic")
    whole = merges.values(merges.plan(path))
    merges.analyze(path, 4)
    assert all((values == whole[name]).all() for name, values in merges.values(merges.plan(path, "100%")).items())


def test_planes_that_are_damaged_after_planning_are_not_served(merges: Merges) -> None:
    path = merges.recipe("task_arithmetic")
    merges.analyze(path, 4)
    plan = merges.plan(path, "10%")
    for file in planes_directory(merges.workspace.catalog.path).iterdir():
        status = file.stat()
        content = bytearray(file.read_bytes())
        content[::50] = bytes(255 - octet for octet in content[::50])
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(SourceChangedError, match=r"\.planes: "):
        merges.values(plan)


def test_without_their_files_planes_are_planned_without(merges: Merges) -> None:
    path = merges.recipe("task_arithmetic")
    before = merges.plan(path, "30%").plan_id
    merges.analyze(path, 4)
    assert merges.plan(path, "30%").plan_id != before
    for file in planes_directory(merges.workspace.catalog.path).iterdir():
        file.unlink()
    assert merges.plan(path, "30%").plan_id == before
