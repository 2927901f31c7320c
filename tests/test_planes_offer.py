"""What a plan without planes says of them: about what they then really bring and cost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Family, family
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.planes.analysis import analyze_planes
from mergefs.planner.build import PlanOptions, draft_plan, make_plan
from mergefs.planner.planes import delta_tasks
from mergefs.planner.planes_offer import PLANES, planes_offer
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def recipe_of(models: Family, tmp_path: Path) -> Callable[[str], Path]:
    return lambda method: write_recipe(tmp_path / f"{method}.yml", MERGES[method], models)


@pytest.mark.parametrize("budget", ["10%", "20%"])
def test_what_planes_are_said_to_bring_they_bring(
    recipe_of: Callable[[str], Path], tmp_path: Path, budget: str
) -> None:
    recipe, options = load_recipe(recipe_of("task_arithmetic")), PlanOptions(budget)
    with Catalog(tmp_path / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        plan = make_plan(recipe, options, workspace)
        offer = planes_offer(plan, workspace)
        assert offer is not None
        assert offer.planes == PLANES
        draft = draft_plan(recipe, options, workspace)
        tasks = delta_tasks(draft.tensors, draft.sources, PLANES)
        analyze_planes(tasks, catalog, workspace.reader, Silence())
        written = sum(path.stat().st_size for path in (tmp_path / "catalog" / "planes").iterdir())
        assert offer.nbytes == pytest.approx(written, rel=0.05)
        with_planes = make_plan(recipe, options, workspace)
        assert planes_offer(with_planes, workspace) is None
        assert offer.relative_error is not None
        assert offer.relative_error < plan.outcome.predicted_relative_error
        assert offer.relative_error == pytest.approx(with_planes.outcome.predicted_relative_error, rel=0.25)


def test_nothing_is_foretold_of_a_method_that_must_be_tried(recipe_of: Callable[[str], Path], tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        offer = planes_offer(make_plan(load_recipe(recipe_of("ties")), PlanOptions("20%"), workspace), workspace)
        assert offer is not None
        assert offer.relative_error is None
        assert offer.nbytes > 0


def test_planes_are_offered_to_a_budget_only(recipe_of: Callable[[str], Path], tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        options = PlanOptions()
        for budget in (None, "100%"):
            plan = make_plan(load_recipe(recipe_of("ties")), replace(options, budget=budget), workspace)
            assert planes_offer(plan, workspace) is None
