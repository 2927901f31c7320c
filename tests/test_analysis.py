"""The analysis of a recipe of any form: all that its merge asks for is learned from one look at each model."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from examples import METHODS
from mounting import environment, run_mergefs
from parity_structures import STRUCTURES, Worlds, worlds_below
from recipes import recipe_document, write_document, write_recipe
from strace import run
from tokenizers_recipes import quick_builder
from worlds import World

from mergefs.catalog import Catalog, default_location
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.engine import Engine
from mergefs.engine.resources import PLANNING_MEMORY
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe

__all__ = ["quick_builder"]

FORMS = {"models": lambda world, merge: [recipe_document(merge, world.family)], **STRUCTURES}
MEMORIES = pytest.mark.parametrize("memory", [PLANNING_MEMORY, 1], ids=["in memory", "read again"])
OF_STATISTICS = ("contents", "deltas", "norms", "histograms", "thresholds", "numbers", "vectors")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return worlds_below(tmp_path_factory.mktemp("worlds"))


@contextmanager
def workspace(catalog: Path, memory: int = PLANNING_MEMORY) -> Iterator[Workspace]:
    resources = Workspace.create(Catalog(catalog), planning_size=memory)
    try:
        yield resources
    finally:
        resources.close()


def analyze(recipe: Path, catalog: Path, memory: int = PLANNING_MEMORY) -> dict[str, int]:
    """Analyse a recipe, and return how many statistics of each kind the catalog has then."""
    with workspace(catalog, memory) as resources:
        analyze_draft(draft_plan(load_recipe(recipe), PlanOptions(), resources), resources, Silence())
        return {kind: resources.catalog.counts()[kind] for kind in OF_STATISTICS}


def read_all(recipe: Path, catalog: Path) -> tuple[bytes, int]:
    """Return the weights of a merge, and how many bytes were read to learn something first."""
    with workspace(catalog) as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(), resources)
        engine = Engine(plan, resources, strict=False)
        weights = b"".join(engine.read_file(file.name, 0, file.size) for file in plan.files)
        return weights, resources.ledger.totals().analysis_bytes_read


def recipe_of(form: str, method: str, world: World, path: Path) -> Path:
    documents: Sequence[dict[str, Any]] = FORMS[form](world, METHODS[method])
    return write_document(path, documents if len(documents) > 1 else documents[0])


@pytest.mark.usefixtures("quick_builder")
@MEMORIES
@pytest.mark.parametrize("form", FORMS)
def test_a_merge_has_nothing_left_to_learn_and_comes_out_the_same(
    tmp_path: Path, worlds: Worlds, form: str, memory: int
) -> None:
    for method in METHODS:
        recipe = recipe_of(form, method, worlds("bfloat16"), tmp_path / f"{method}.yml")
        unknown, learned = read_all(recipe, tmp_path / f"{method} unknown")
        found = analyze(recipe, tmp_path / method, memory)
        assert read_all(recipe, tmp_path / method) == (unknown, 0), method
        assert (learned > 0) <= (found["contents"] > 0)
        assert analyze(recipe, tmp_path / method, memory) == found, method


def test_what_is_learned_is_kept_under_contents_and_found_for_copies(tmp_path: Path, worlds: Worlds) -> None:
    world = worlds("bfloat16")
    copies = Family(tmp_path / "base", (tmp_path / "first", tmp_path / "second"))
    for path, copy in zip((world.base, world.first, world.second), (copies.base, *copies.experts), strict=True):
        shutil.copytree(path, copy)
    for method, merge in METHODS.items():
        recipe = write_recipe(tmp_path / "recipes" / f"{method}.yml", merge, world.family)
        of_copies = write_recipe(tmp_path / "recipes" / f"{method} of copies.yml", merge, copies)
        found = analyze(recipe, tmp_path / method)
        again = analyze(of_copies, tmp_path / method)
        assert again.pop("contents") == 2 * found.pop("contents")
        assert again == found, method


# As the operating system sees it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of 13 MiB each, whose largest tensors have five blocks."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, hidden=512, layers=1, vocabulary=5000
    )


@pytest.mark.parametrize("method", ["ties", "slerp", "della", "model_stock", "karcher", "breadcrumbs_ties", "nuslerp"])
def test_the_operating_system_sees_each_byte_of_the_weights_read_once(
    models: Family, tmp_path: Path, method: str
) -> None:
    merge = METHODS[method]
    recipe = write_recipe(tmp_path / "recipe.yml", merge, models)
    arguments = [sys.executable, "-m", "mergefs.cli", "analyze", str(recipe)]
    trace = run(tmp_path / "trace", arguments, environment(tmp_path / "state"))
    for model in (models.base, *models.experts)[not merge.with_base :][: len(merge.per_expert) + merge.with_base]:
        checkpoint = open_checkpoint(model)
        headers = sum(shard.header.data_start for shard in checkpoint.shards)  # may be looked at again
        read = trace.total(sorted(model.glob("*.safetensors")))
        assert checkpoint.total_bytes <= read - headers <= checkpoint.total_bytes + headers
    assert not any(path.suffix == ".safetensors" for path in trace.mapped)


def test_an_analysis_with_little_memory_reads_some_of_it_again(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", METHODS["della"], models)
    total = 3 * open_checkpoint(models.base).total_bytes
    read = {}
    for memory in ("256MiB", "268MiB", "2GiB"):  # of which 256 MiB are not for tensors
        known = {"MERGEFS_CATALOG": str(tmp_path / f"catalog {memory}")}
        done = run_mergefs("analyze", recipe, "--memory", memory, "--json", state=tmp_path / "state", extra=known)
        assert done.returncode == 0, done.stderr
        read[memory] = json.loads(done.stdout)["analysis_bytes_read"]
    assert read["2GiB"] == total < read["268MiB"] < read["256MiB"]


def test_what_depends_on_the_seed_is_learned_for_the_seed_that_is_said(models: Family, tmp_path: Path) -> None:
    recipe, state = write_recipe(tmp_path / "recipe.yml", METHODS["della"], models), tmp_path / "state"
    assert run_mergefs("analyze", recipe, "--random-seed", "7", state=state).returncode == 0
    with Catalog(default_location()) as catalog:
        learned = {"analysed": catalog.counts()}
    for seed in ("7", "8"):
        out = tmp_path / f"out {seed}"
        done = run_mergefs("materialize", recipe, out, "--random-seed", seed, "--json", state=state)
        assert done.returncode == 0, done.stderr
        with Catalog(default_location()) as catalog:
            learned[seed] = catalog.counts()
    assert all(learned["7"][kind] == learned["analysed"][kind] for kind in OF_STATISTICS)
    kinds = {kind for kind in OF_STATISTICS if learned["8"][kind] != learned["7"][kind]}
    assert kinds == {"vectors"}, "nothing but sums of what is drawn, and these anew"
    assert run_mergefs("analyze", recipe, "--random-seed", "8", state=state).stdout.endswith("was known already\n")
