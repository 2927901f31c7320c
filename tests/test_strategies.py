"""Ways to spend a budget: what each of them may buy."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.planes.analysis import analyze_planes
from mergefs.planner.build import Draft, PlanOptions, analyze_draft, draft_plan
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE
from mergefs.planner.plan import TensorPlan
from mergefs.planner.planes import delta_tasks
from mergefs.planner.prediction.prediction import Predictor
from mergefs.planner.selection import select_blocks
from mergefs.planner.spending import spend
from mergefs.planner.strategy import Strategy
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe

PLANES = 4


class Analysed:
    """A family of two experts whose deltas are in the catalog, in planes too."""

    def __init__(self, name: str, models: Family, directory: Path, workspace: Workspace) -> None:
        recipe = load_recipe(write_recipe(directory / f"{name}.yml", MERGES[name], models))
        self.workspace = workspace
        draft = draft_plan(recipe, PlanOptions(), workspace)
        analyze_draft(draft, workspace, Silence())
        tasks = delta_tasks(draft.tensors, draft.sources, PLANES)
        analyze_planes(tasks, workspace.catalog, workspace.reader, Silence())
        self.draft: Draft = draft_plan(recipe, PlanOptions(), workspace)
        self.total = sum(tensor.expert_bytes for tensor in self.draft.tensors)

    def select(self, share: float, strategy: Strategy) -> tuple[TensorPlan, ...]:
        limit = int(share * self.total)
        tensors = select_blocks(
            self.draft.tensors, self.workspace.catalog, self.workspace.statistics, limit, strategy
        ).tensors
        spent = sum(tensor.planned_expert_bytes for tensor in tensors)
        assert 0 < spent <= limit
        return tensors


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Analysed]:
    directory = tmp_path_factory.mktemp("strategies")
    models = family(directory / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    with Catalog(directory / "catalog") as catalog:
        yield Analysed("ties", models, directory, Workspace.create(catalog))


@pytest.fixture(scope="module")
def linear(analysed: Analysed, tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    directory = tmp_path_factory.mktemp("linear")
    models = family(directory / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    return Analysed("task_arithmetic", models, directory, analysed.workspace)


def levels_of(tensors: tuple[TensorPlan, ...]) -> set[int]:
    found = [t.selection.levels for t in tensors if t.selection is not None and t.context is not None]
    return {int(level) for levels in found for level in np.unique(levels)}


def test_planes_are_bought_where_they_are_and_may_be(analysed: Analysed) -> None:
    assert levels_of(analysed.select(0.2, Strategy())) & set(range(1, PLANES + 1))
    assert levels_of(analysed.select(0.2, Strategy(planes=False))) <= {NOTHING, EQUAL, WHOLE}


@pytest.mark.parametrize("fewest", [1, 2, 3, 4, 9])
def test_fewer_planes_than_wanted_are_not_bought(analysed: Analysed, fewest: int) -> None:
    levels = levels_of(analysed.select(0.2, Strategy(fewest_planes=fewest)))
    assert levels & set(range(min(fewest, PLANES), PLANES + 1))
    assert not levels & set(range(1, min(fewest, PLANES)))


@pytest.mark.parametrize("planes", [False, True])
def test_experts_that_are_bought_together_have_the_same_levels(analysed: Analysed, planes: bool) -> None:
    found = set()
    for tensor in analysed.select(0.3, Strategy(planes=planes, together=True)):
        if tensor.selection is None or tensor.context is None:
            continue
        experts = tensor.selection.levels[list(tensor.context.experts)]
        for cell in experts.T:
            open_levels = {int(level) for level in cell if level != EQUAL}
            assert len(open_levels) <= 1
            found |= open_levels
    assert len(found) > 1


def test_without_angles_the_largest_norms_are_bought(analysed: Analysed) -> None:
    from mergefs.planner.responses import response_of
    from mergefs.statistics.blocks import known_deltas

    bought, left = [], []
    for tensor in analysed.select(0.3, Strategy(planes=False, angles=False)):
        response = response_of(tensor, analysed.workspace.statistics)
        if tensor.selection is None or tensor.context is None or response is None or tensor.stand_in is None:
            continue
        for index in tensor.context.experts:
            deltas = known_deltas(tensor.places[index], tensor.stand_in, tensor.compute, analysed.workspace.catalog)
            assert deltas is not None
            weight = response.factors[index] ** 2 + response.spreads[index]
            worth = weight * deltas.squared_norms / tensor.places[index].nbytes * tensor.grid.count
            for value, level in zip(worth, tensor.selection.levels[index], strict=True):
                if level != EQUAL:
                    (bought if level == WHOLE else left).append(float(value))
    assert bought
    assert left
    # What fills the rest of the budget is the exception: a small tensor that still fits.
    assert np.median(bought) > np.median(left)


# The best of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_a_method_that_is_not_linear_gets_the_way_that_leaves_the_least(analysed: Analysed, share: float) -> None:
    tensors, prediction = spend(analysed.draft.tensors, int(share * analysed.total), analysed.workspace)
    predictor = Predictor(analysed.workspace)
    assert predictor.predict(tensors).relative_error == prediction.relative_error
    assert prediction.how != "gram"
    ways = (
        *(Strategy(), Strategy(together=True), Strategy(fewest_planes=3)),
        *(Strategy(planes=False), Strategy(planes=False, angles=False), Strategy(planes=False, together=True)),
    )
    errors = [predictor.predict(analysed.select(share, way)).relative_error for way in ways]
    assert prediction.relative_error == min(errors)
    assert len(set(errors)) > 1


def test_a_linear_method_needs_no_try(linear: Analysed) -> None:
    before = linear.workspace.ledger.totals().analysis_bytes_read
    tensors, prediction = spend(linear.draft.tensors, linear.total // 4, linear.workspace)
    assert prediction.how == "gram"
    assert linear.workspace.ledger.totals().analysis_bytes_read == before
    chosen = [tensor.selection.levels.tobytes() for tensor in tensors if tensor.selection is not None]
    by_worth = [tensor.selection.levels.tobytes() for tensor in linear.select(0.25, Strategy()) if tensor.selection]
    assert chosen == by_worth
