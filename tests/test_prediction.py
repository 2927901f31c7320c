"""What a plan predicts of a budget, against what the budget changes."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prediction_cases import (
    BLOCK_ELEMENTS,
    METHODS,
    Outcome,
    describe,
    measured,
    random_outcomes,
    write_family,
    write_random_recipe,
)
from recipes import write_document

from mergefs.catalog import Catalog
from mergefs.checkpoint.dtypes import BF16, F32
from mergefs.engine.workspace import Workspace
from mergefs.kernels.precision import Precision
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.prediction import sampled
from mergefs.planner.prediction.prediction import Predictor
from mergefs.planner.prediction.quantised import rounded_change
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks


@pytest.fixture
def workspace(catalogs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK_ELEMENTS)
    workspace = Workspace.create(Catalog(Path(tempfile.mkdtemp(dir=catalogs))))
    yield workspace
    workspace.close()


def off(outcome: Outcome) -> float:
    """Return by which part of the measured error the predicted one is off."""
    return abs(outcome.predicted.predicted_relative_error / outcome.relative_error - 1)


def check(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Require that no bound is broken and that what was measured is so; return the estimates of linear merges."""
    for outcome in outcomes:
        predicted = outcome.predicted
        if predicted.error_bound is not None:
            assert outcome.error <= predicted.error_bound, describe(outcome)
        if predicted.predicted_by == "exact":
            assert predicted.predicted_relative_error == pytest.approx(outcome.relative_error, rel=1e-6, abs=1e-12)
    return [o for o in outcomes if o.predicted.predicted_by == "gram" and o.relative_error > 0]


def test_two_hundred_random_budgets_are_predicted_and_their_bounds_hold(tmp_path: Path, workspace: Workspace) -> None:
    outcomes = list(random_outcomes(tmp_path, workspace, 200, seed=4))
    estimated = check(outcomes)
    assert sum(outcome.predicted.error_bound is not None for outcome in outcomes) > 100
    assert len(estimated) > 70
    assert len({outcome.method for outcome in estimated}) >= 7
    assert statistics.median(map(off, estimated)) < 0.1
    norms = [o.predicted.merged_delta_norm / o.merged for o in estimated if o.predicted.merged_delta_norm and o.merged]
    assert statistics.median(abs(ratio - 1) for ratio in norms) < 0.1


def test_budgets_that_buy_planes_are_predicted_and_their_bounds_hold(tmp_path: Path, workspace: Workspace) -> None:
    outcomes = list(random_outcomes(tmp_path, workspace, 30, seed=9, planes=3))
    estimated = check(outcomes)
    assert len(estimated) > 10
    assert statistics.median(map(off, estimated)) < 0.1


# A sample of the blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs", "sce", "ram"])
def test_a_sample_of_the_blocks_estimates_the_error_within_its_standard_error(
    name: str, tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(8)
    method = next(method for method in METHODS if method.name == name)
    family = write_family(tmp_path / "family", generator)
    monkeypatch.setattr(sampled, "EVERYTHING_BYTES", 0)  # so as few as there may be: a quarter of them
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    distances = []
    for number in range(6):
        recipe = write_random_recipe(tmp_path / f"{number}.yml", replace(method, fewest=2), family, generator)
        outcome = measured(recipe, "40%", None, workspace)
        predicted = outcome.predicted
        assert predicted.predicted_by == "sampled"
        assert predicted.predicted_standard_error is not None
        assert predicted.predicted_standard_error < 0.2 * predicted.predicted_relative_error
        distances.append(predicted.predicted_relative_error / outcome.relative_error - 1)
    assert statistics.median(map(abs, distances)) < 0.1


def test_what_was_measured_is_not_measured_again(tmp_path: Path, workspace: Workspace) -> None:
    generator = np.random.default_rng(1)
    family = write_family(tmp_path / "family", generator)
    method = next(method for method in METHODS if method.name == "ties")
    recipe = load_recipe(write_random_recipe(tmp_path / "recipe.yml", method, family, generator))
    first = make_plan(recipe, PlanOptions("40%"), workspace)
    read = workspace.ledger.totals().analysis_bytes_read
    again = make_plan(recipe, PlanOptions("40%"), workspace)
    assert workspace.ledger.totals().analysis_bytes_read == read
    assert again.outcome == first.outcome
    other = make_plan(recipe, PlanOptions("20%"), workspace)
    assert workspace.ledger.totals().analysis_bytes_read > read
    assert other.outcome.predicted_relative_error > first.outcome.predicted_relative_error


def test_a_prediction_that_may_not_measure_reads_nothing(tmp_path: Path, workspace: Workspace) -> None:
    generator = np.random.default_rng(2)
    family = write_family(tmp_path / "family", generator)
    method = next(method for method in METHODS if method.name == "ties")
    recipe = write_random_recipe(tmp_path / "recipe.yml", method, family, generator)
    plan = make_plan(load_recipe(recipe), PlanOptions("30%"), workspace)
    tensors = [
        replace(tensor, context=replace(tensor.context, seed=7)) for tensor in plan.tensors.values() if tensor.context
    ]
    read = workspace.ledger.totals().analysis_bytes_read
    unmeasured = Predictor(workspace).predict(tensors, measure=False)
    assert workspace.ledger.totals().analysis_bytes_read == read
    assert unmeasured.how == "gram"
    assert unmeasured.relative_error == pytest.approx(plan.outcome.predicted_relative_error, rel=0.5)
    known = Predictor(workspace).predict(tuple(plan.tensors.values()), measure=False)
    assert known.how == "exact"
    assert known.relative_error == plan.outcome.predicted_relative_error


# What is certain ------------------------------------------------------------------------------------------------------


def test_nothing_is_left_out_where_everything_is_bought(tmp_path: Path, workspace: Workspace) -> None:
    generator = np.random.default_rng(3)
    family = write_family(tmp_path / "family", generator)
    for number, method in enumerate(METHODS):
        recipe = load_recipe(write_random_recipe(tmp_path / f"{number}.yml", method, family, generator))
        base = None if method.base else str(family.base)
        total = make_plan(recipe, PlanOptions(None, base), workspace).outcome.expert_bytes_total
        for budget in (None, str(total - 1)):
            outcome = make_plan(recipe, PlanOptions(budget, base), workspace).outcome
            if outcome.blocks_selected == outcome.blocks_total:
                found = (outcome.predicted_relative_error, outcome.predicted_by, outcome.error_bound)
                assert found == (0.0, "exact", 0.0)
                assert outcome.error_bound_relative == 0.0


def test_nothing_is_certain_where_a_number_could_outgrow_its_dtype(tmp_path: Path, workspace: Workspace) -> None:
    generator = np.random.default_rng(6)
    family = write_family(tmp_path / "family", generator)
    method = next(method for method in METHODS if method.name == "task_arithmetic")
    recipe = write_random_recipe(tmp_path / "recipe.yml", method, family, generator)
    document = json.loads(recipe.read_text()) | {"dtype": "float16"}
    for weight, certain in ((1.0, True), (1e7, False)):
        for entry in document["models"]:
            entry["parameters"]["weight"] = weight
        document["parameters"] = {"lambda": 1e-7}
        outcome = make_plan(
            load_recipe(write_document(tmp_path / f"{weight}.yml", document)), PlanOptions("50%"), workspace
        ).outcome
        assert (outcome.error_bound is not None) is certain


# What rounding does to a change ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dithered", [True, False])
@pytest.mark.parametrize("steps", [0.1, 0.3, 1.0, 5.0, 30.0])
def test_what_rounding_makes_of_a_change_is_what_it_is_on_average(steps: float, dithered: bool) -> None:
    generator = np.random.default_rng(0)
    precision = Precision(BF16)
    size, unit = 200_000, 2.0**-8
    base = precision.round((0.05 * generator.standard_normal(size)).astype(np.float32)).astype(np.float64)
    change = 0.05 * unit * steps * generator.standard_normal(size)
    beside = 0.05 * generator.standard_normal(size) if dithered else np.zeros(size)
    before, after = (precision.round((base + beside + moved).astype(np.float32)) for moved in (0 * change, change))
    found = float(((after.astype(np.float64) - before) ** 2).mean())
    inputs = (np.array([float((values**2).mean())]) for values in (change, beside, base + beside))
    expected = float(rounded_change(*inputs, BF16, on_grid=True)[0])
    assert expected == pytest.approx(found, rel=0.12)


def test_rounding_to_a_fine_dtype_changes_nothing() -> None:
    change = np.array([1e-4, 0.0, 1.0])
    beside, base = np.zeros(3), np.ones(3)
    assert rounded_change(change, beside, base, F32, on_grid=False) == pytest.approx(change, rel=1e-3)
    assert math.isfinite(float(rounded_change(change, beside, np.zeros(3), F32, on_grid=True).sum()))
