"""Stacks and merges of merges are read as any other: in ranges, in parallel, within a budget, mounted, written."""

import json
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family, write_model
from mounting import mounted_recipes, run_mergefs
from recipes import write_document
from tensors import load_model
from test_structure import chained, sliced, source

import mergefs
from mergefs.catalog import Catalog
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.errors import BudgetError
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks

Documents = Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("structure")
    return family(directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, layers=4, hidden=64)


def stack(models: Family) -> Documents:
    first, second = models.experts
    return sliced(
        [source(first, 0, 3)], [source(second, 1, 4)], merge_method="passthrough", base_model=str(models.base)
    )


def stacked_slerp(models: Family) -> Documents:
    return sliced(
        [source(models.base, 0, 3), source(models.experts[0], 1, 4)],
        [source(models.base, 1, 4), source(models.experts[1], 0, 3)],
        merge_method="slerp",
        base_model=str(models.base),
        parameters={"t": [0.2, 0.8]},
    )


def ties_of_a_merge(models: Family) -> Documents:
    return chained(models, "inner")


def ties_of_ties_of_ties(models: Family) -> Documents:
    inner, outer = chained(models, "inner")
    middle = {**outer, "name": "middle"}
    return [
        {**inner, "merge_method": "ties", "parameters": {"density": 0.3}},
        middle,
        {**outer, "models": [{"model": "middle", "parameters": {"weight": 0.5, "density": 0.2}}, *outer["models"]]},
    ]


Structure = Callable[[Family], Documents]
STRUCTURES = pytest.mark.parametrize("structure", [stack, stacked_slerp, ties_of_a_merge, ties_of_ties_of_ties])


@STRUCTURES
def test_any_range_equals_the_whole_whoever_reads_and_in_any_order(
    models: Family, tmp_path: Path, structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 512)
    recipe = load_recipe(write_document(tmp_path / "recipe.yml", structure(models)))
    workspaces = [Workspace.create(Catalog(tmp_path / name)) for name in ("whole", "ranges")]
    plans = [make_plan(recipe, PlanOptions(), workspace) for workspace in workspaces]
    whole, ranges = (Engine(plan, workspace, strict=False) for plan, workspace in zip(plans, workspaces, strict=True))
    size = plans[0].files[0].size
    expected = whole.read_file("model.safetensors", 0, size)
    draw = random.Random(0)
    wanted = [(start, start + draw.randrange(1, 3000)) for start in draw.sample(range(size), 300)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda bounds: ranges.read_file("model.safetensors", bounds[0], bounds[1] - bounds[0]), wanted)
        )
    assert all(data == expected[start:stop] for (start, stop), data in zip(wanted, found, strict=True))
    for workspace in workspaces:
        workspace.close()


@STRUCTURES
@pytest.mark.parametrize("budget", ["60%", "100%"])
def test_no_more_is_read_than_planned_and_what_is_written_is_verified(
    models: Family, tmp_path: Path, structure: Structure, budget: str
) -> None:
    recipe = write_document(tmp_path / "recipe.yml", structure(models))
    options = [] if budget == "100%" else ["--budget", budget]
    with mergefs.open(recipe, budget=budget, catalog=tmp_path / "catalog") as model:
        outcome = model.plan.outcome
        before = model.bytes_read["analysis_bytes_read"]
        tensors = {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118
        read = model.bytes_read
        weights = model.read_file("model.safetensors")
    assert 0 < read["expert_bytes_read"] <= outcome.expert_bytes_planned
    assert outcome.expert_bytes_planned <= outcome.expert_bytes_total
    assert budget == "100%" or outcome.expert_bytes_planned <= 0.6 * outcome.expert_bytes_total
    assert budget == "100%" or read["analysis_bytes_read"] == before
    assert len(tensors) > 20
    done = run_mergefs(
        "--catalog", tmp_path / "catalog", "materialize", recipe, tmp_path / "out", *options, state=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    done = run_mergefs("--catalog", tmp_path / "catalog", "verify", "--deep", tmp_path / "out", state=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_budget_that_a_merged_base_alone_exceeds_is_refused(models: Family, tmp_path: Path) -> None:
    inner, outer = chained(models, "inner")
    outer["base_model"] = "inner"
    outer["models"] = outer["models"][1:]
    with pytest.raises(BudgetError, match=r"must be read whole.*raise the budget"):
        mergefs.open(
            write_document(tmp_path / "recipe.yml", [inner, outer]), budget="10%", catalog=tmp_path / "catalog"
        )


def test_a_nan_deep_inside_is_named_with_its_file(models: Family, tmp_path: Path) -> None:
    tensors = load_model(models.experts[0])
    tensors["lm_head.weight"][1, 2] = math.nan
    broken = write_model(tmp_path / "broken", tensors, json.loads((models.experts[0] / "config.json").read_text()))
    inner, outer = chained(Family(models.base, (broken, models.experts[1])), "inner")
    recipe = write_document(tmp_path / "recipe.yml", [inner, {**outer, "parameters": {"normalize": False}}])
    done = run_mergefs("materialize", recipe, tmp_path / "out", state=tmp_path)
    assert done.returncode == 1
    assert f"{broken}/" in done.stderr
    assert "tensor 'lm_head.weight' holds some" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mount_shows_the_result_alone(models: Family, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", ties_of_a_merge(models))
    with mergefs.open(recipe, catalog=tmp_path / "catalog") as model:
        expected = model.read_file("model.safetensors")
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state") as mount:
        assert (mount.mountpoint / "model.safetensors").read_bytes() == expected
        card = (mount.mountpoint / "README.md").read_text()
        made_of = json.loads((mount.mountpoint / "mergefs.json").read_text())["inputs"]
        assert sorted(path.name for path in mount.mountpoint.glob("*.safetensors")) == ["model.safetensors"]
    leaves = [str(path) for path in (*models.experts, models.base)]
    assert [line[3:-1] for line in card.splitlines() if line.startswith('- "')] == leaves
    assert f"* `inner` (expert, merged by Task arithmetic)\n  * `{models.experts[0]}` (expert)" in card
    assert [entry["reference"] for entry in made_of] == ["inner", leaves[1], leaves[2]]
    assert [entry["reference"] for entry in made_of[0]["inputs"]] == leaves
