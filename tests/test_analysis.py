"""The analysis of a recipe of any form: all that its merge asks for is learned from one look at each model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family, write_model
from examples import METHODS
from mounting import environment, run_mergefs
from parity_structures import STRUCTURES, Worlds, worlds_below
from recipes import MERGES, recipe_document, used_experts, write_document, write_recipe
from strace import run
from tokenizers_recipes import quick_builder
from worlds import World

from mergefs.catalog import Catalog, default_location
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.engine import Engine
from mergefs.engine.resources import PLANNING_MEMORY
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.processors import usable_processors
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
    learned = set()
    for method in METHODS:
        recipe = recipe_of(form, method, worlds("bfloat16"), tmp_path / f"{method}.yml")
        unknown, read = read_all(recipe, tmp_path / f"{method} unknown")
        found = analyze(recipe, tmp_path / method, memory)
        assert read_all(recipe, tmp_path / method) == (unknown, 0), method
        assert analyze(recipe, tmp_path / method, memory) == found, method
        learned |= {method} if read else set()
    assert {"ties", "slerp", "della", "model_stock", "karcher", "sce"} <= learned  # or there was nothing to see


@pytest.mark.parametrize("form", ["models", "slices"])
def test_what_is_learned_is_kept_under_contents_and_found_for_copies(tmp_path: Path, worlds: Worlds, form: str) -> None:
    """Also where a layer comes twice, so that what is learned of one needs what is learned of the other."""
    world = worlds("bfloat16")
    copies = replace(world, base=tmp_path / "base", first=tmp_path / "first", second=tmp_path / "second")
    for path, copy in ((world.base, copies.base), (world.first, copies.first), (world.second, copies.second)):
        shutil.copytree(path, copy)
    for method in METHODS:
        found = analyze(recipe_of(form, method, world, tmp_path / "recipe.yml"), tmp_path / method)
        again = analyze(recipe_of(form, method, copies, tmp_path / "of-copies.yml"), tmp_path / method)
        assert again.pop("contents") == 2 * found.pop("contents")
        assert again == found, method


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of 13 MiB each, whose largest tensors have five blocks."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, hidden=512, layers=1, vocabulary=5000
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=2)


def weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def headers(model: Path) -> int:
    return sum(shard.header.data_start for shard in open_checkpoint(model).shards)


@pytest.mark.parametrize("method", ["ties", "slerp", "della", "model_stock", "karcher", "breadcrumbs_ties", "nuslerp"])
def test_the_operating_system_sees_each_byte_of_the_weights_read_once(
    large_models: Family, tmp_path: Path, method: str
) -> None:
    merge = METHODS[method]
    recipe = write_recipe(tmp_path / "recipe.yml", merge, large_models)
    arguments = [sys.executable, "-m", "mergefs.cli", "analyze", str(recipe)]
    trace = run(tmp_path / "trace", arguments, environment(tmp_path / "state"))
    for model in (*[large_models.base] * merge.with_base, *used_experts(merge, large_models)):
        size = open_checkpoint(model).total_bytes
        beside_headers = trace.total(weight_files(model)) - headers(model)
        assert size <= beside_headers <= size + headers(model)  # which may be looked at again
    assert not any(path.suffix == ".safetensors" for path in trace.mapped)


def test_an_analysis_with_little_memory_reads_some_of_it_again(large_models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", METHODS["della"], large_models)
    total = 3 * open_checkpoint(large_models.base).total_bytes
    read = {}
    for memory in ("256MiB", "268MiB", "2GiB"):  # of which 256 MiB are not for tensors
        known = {"MERGEFS_CATALOG": str(tmp_path / f"catalog {memory}")}
        done = run_mergefs("analyze", recipe, "--memory", memory, "--json", state=tmp_path / "state", extra=known)
        assert done.returncode == 0, done.stderr
        read[memory] = json.loads(done.stdout)["analysis_bytes_read"]
    assert read["2GiB"] == total < read["268MiB"] < read["256MiB"]


def test_what_depends_on_the_seed_is_learned_for_the_seed_that_is_said(large_models: Family, tmp_path: Path) -> None:
    recipe, state = write_recipe(tmp_path / "recipe.yml", METHODS["della"], large_models), tmp_path / "state"
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


def recipe_of_experts(path: Path, base: Path, *experts: Path) -> Path:
    entries = [{"model": str(expert), "parameters": {"weight": 0.5}} for expert in experts]
    document = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries, "dtype": "bfloat16"}
    return write_document(path, document)


def test_the_operating_system_sees_an_added_expert_read_once_and_the_others_not_at_all(
    models: Family, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    first, second = models.experts
    one = recipe_of_experts(tmp_path / "one.yml", models.base, first)
    both = recipe_of_experts(tmp_path / "both.yml", models.base, first, second)
    assert run_mergefs("analyze", one, state=state).returncode == 0
    arguments = [sys.executable, "-m", "mergefs.cli", "analyze", str(both)]
    trace = run(tmp_path / "trace", arguments, environment(state))
    of_headers = [trace.total(weight_files(model)) - headers(model) for model in (models.base, first, second)]
    size = open_checkpoint(second).total_bytes
    assert of_headers[1] <= headers(first)  # headers may be looked at again, tensors not
    assert size <= of_headers[2] <= size + headers(second)
    assert of_headers[0] < size + headers(models.base)
    again = run(tmp_path / "again", arguments, environment(state))
    for model in (models.base, first, second):
        assert again.total(weight_files(model)) <= 2 * headers(model)


def test_the_command_says_of_each_model_what_was_read_and_what_was_known(models: Family, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first, second = models.experts
    one = recipe_of_experts(tmp_path / "one.yml", models.base, first)
    both = recipe_of_experts(tmp_path / "both.yml", models.base, first, second)
    told = []
    for recipe in (one, both, both):
        done = run_mergefs("analyze", recipe, "--json", state=state)
        assert done.returncode == 0, done.stderr
        told.append({Path(entry["path"]): entry for entry in json.loads(done.stdout)["models"]})
    size = open_checkpoint(first).total_bytes
    counts = [
        {model: (entry["analysis_bytes_read"], entry["known_bytes"]) for model, entry in run.items()} for run in told
    ]
    assert counts[0] == {models.base: (size, 0), first: (size, 0)}
    read_of_base, known_of_base = counts[1][models.base]
    assert 0 < read_of_base < size == known_of_base
    assert (counts[1][first], counts[1][second]) == ((0, size), (size, 0))
    assert set(counts[2].values()) == {(0, size)}
    shown = run_mergefs("analyze", both, state=state).stdout
    assert "known before" in shown
    assert "everything was known already" in shown


def test_a_copied_and_resharded_expert_is_read_once(models: Family, tmp_path: Path) -> None:
    state = tmp_path / "state"
    expert = models.experts[0]
    assert (
        run_mergefs("analyze", recipe_of_experts(tmp_path / "one.yml", models.base, expert), state=state).returncode
        == 0
    )
    opened = open_checkpoint(expert)
    from safetensors.torch import load_file

    tensors = {name: tensor for file in weight_files(expert) for name, tensor in load_file(file).items()}
    copy = write_model(tmp_path / "copy", tensors, json.loads((expert / "config.json").read_text()), shards=3)
    done = run_mergefs("analyze", recipe_of_experts(tmp_path / "two.yml", models.base, copy), "--json", state=state)
    told = {Path(entry["path"]): entry for entry in json.loads(done.stdout)["models"]}
    assert told[copy]["analysis_bytes_read"] == opened.total_bytes
    assert told[models.base]["analysis_bytes_read"] == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.planner import analysis
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe

class Deadly(Silence):
    done = 0
    def advance(self, size):
        self.done += size
        if self.done > int(sys.argv[3]):
            print(workspace.ledger.totals().analysis_bytes_read, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

analysis._FLUSH_BYTES = int(sys.argv[4])
workspace = Workspace.create(Catalog(Path(sys.argv[2])))
draft = draft_plan(load_recipe(Path(sys.argv[1])), PlanOptions(), workspace)
analyze_draft(draft, workspace, Deadly())
print(workspace.ledger.totals().analysis_bytes_read)
"""


def test_an_analysis_that_was_killed_goes_on_where_it_was(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    catalog = tmp_path / "catalog"
    total = 3 * open_checkpoint(models.base).total_bytes
    flush = total // 10
    reads, finished = [], False
    for _ in range(10):
        arguments = [sys.executable, "-c", KILLED, str(recipe), str(catalog), str(total // 3), str(flush)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
        reads.append(int(done.stdout))
        finished = done.returncode == 0
        if finished:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    largest = max(tensor.nbytes for tensor in open_checkpoint(models.base).tensors.values())
    assert finished
    assert len(reads) > 1
    # Each time at most what had not been flushed was lost: a tenth, and a tensor of all three models for each thread.
    lost = flush + (max(2, usable_processors()) + 1) * 3 * largest
    assert total <= sum(reads) <= total + (len(reads) - 1) * lost
    with Catalog(catalog) as opened:
        assert opened.counts()["contents"] == 3 * len(open_checkpoint(models.base).tensors)
