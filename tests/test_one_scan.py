"""Models that nobody has analysed are read once: what is learned and what is merged come from the same bytes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import strace
import torch
from checkpoints import Family, family
from mounting import environment
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.engine.workspace import Workspace
from mergefs.errors import SourceChangedError, UsageError
from mergefs.materialize.manifest import read_manifest
from mergefs.materialize.materialize import Materialized, materialize
from mergefs.materialize.memory import Memory
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources.blocks import BLOCK_ELEMENTS, BlockGrid
from mergefs.sources.holding import HeldBlocks
from mergefs.sources.learning import LearnedHashes
from mergefs.sources.verification import BlockCheck
from mergefs.statistics.contents import learned_hashes
from mergefs.statistics.identity import is_local, known_blocks

MIB = 2**20
STATISTICS = ["ties", "slerp", "task_arithmetic"]
"""Thresholds, norms and inner products, and none at all."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of 26 MiB each, whose largest tensors have 11 blocks."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, hidden=512, layers=1, vocabulary=11000
    )


@pytest.fixture(params=STATISTICS)
def recipe(request: pytest.FixtureRequest, models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", MERGES[request.param], models)


@contextmanager
def workspace(catalog: Path, held_size: int) -> Iterator[Workspace]:
    resources = Workspace.create(Catalog(catalog), held_size=held_size)
    try:
        yield resources
    finally:
        resources.close()


def write(recipe: Path, out: Path, held_size: int, identified: bool = False) -> Materialized:
    """Write a model with a catalog of its own."""
    with workspace(out.with_name(f"{out.name} catalog"), held_size) as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(), resources, identified=identified)
        return materialize(plan, out, resources)


def shards(recipe: Path) -> list[Path]:
    """Return the files of all models of a recipe that have weights."""
    document = json.loads(recipe.read_text())
    directories = {entry["model"] for entry in document["models"]} | {document["base_model"]}
    return [shard for directory in sorted(directories) for shard in sorted(Path(directory).glob("*.safetensors"))]


def test_strace_sees_each_byte_of_the_weights_once(recipe: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "mergefs", "materialize", "--json", recipe, tmp_path / "out"]
    trace = strace.run(tmp_path / "log", arguments, environment(tmp_path / "state"))
    files = shards(recipe)
    sizes = sum(path.stat().st_size for path in files)
    headers = sum(MIB // 16 for _ in files)  # which are read to open a model, too
    assert sizes - headers < trace.total(files) < sizes + headers
    assert trace.mapped.isdisjoint(files)


def test_the_ledger_counts_them_once_and_on_the_account_of_the_merge(recipe: Path, tmp_path: Path) -> None:
    result = write(recipe, tmp_path / "out", held_size=256 * MIB)
    manifest = read_manifest(tmp_path / "out")
    assert result.totals.analysis_bytes_read == 0
    assert result.totals.expert_bytes_reread == 0
    assert result.totals.expert_bytes_read == manifest.cost.expert_bytes_planned == manifest.cost.expert_bytes_read


def test_the_model_is_the_same_as_where_all_was_known_before(recipe: Path, tmp_path: Path) -> None:
    known = write(recipe, tmp_path / "known", held_size=0, identified=True)
    learned = write(recipe, tmp_path / "learned", held_size=256 * MIB)
    assert learned.manifest == known.manifest
    assert not is_local(learned.plan_id)
    assert learned.plan_id == known.plan_id


def test_what_was_learned_is_in_the_catalog(recipe: Path, models: Family, tmp_path: Path) -> None:
    write(recipe, tmp_path / "out", held_size=256 * MIB)
    with workspace(tmp_path / "out catalog", 256 * MIB) as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(), resources, identified=True)
        assert not is_local(plan.plan_id)
        materialize(plan, tmp_path / "again", resources)
        assert resources.ledger.totals().analysis_bytes_read == 0
        checkpoint = open_checkpoint(models.experts[0])
        for tensor in checkpoint.tensors.values():
            assert known_blocks(checkpoint.shards[tensor.shard], tensor, resources.catalog) is not None


def test_what_there_is_no_room_for_is_read_again(recipe: Path, tmp_path: Path) -> None:
    known = write(recipe, tmp_path / "known", held_size=0, identified=True)
    analysed = []
    for held in (1, 8 * MIB, 20 * MIB, 256 * MIB):
        result = write(recipe, tmp_path / f"out {held}", held_size=held)
        assert result.manifest == known.manifest
        analysed.append(result.totals.analysis_bytes_read)
    if "task_arithmetic" in recipe.read_text():
        assert set(analysed) == {0}
    else:
        assert analysed[0] > analysed[1] > analysed[2] > analysed[3] == 0


# Blocks that are held -------------------------------------------------------------------------------------------------


def test_blocks_are_held_as_far_as_there_is_room_until_all_users_are_done(models: Family) -> None:
    checkpoint = open_checkpoint(models.experts[0])
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    shard = checkpoint.shards[tensor.shard]
    held = HeldBlocks(2 * MIB)
    blocks = [np.full(MIB, number, dtype=np.uint8) for number in range(3)]
    for number, block in enumerate(blocks):
        held.hold(shard, tensor, number * BLOCK_ELEMENTS, block)

    def found(number: int) -> bool:
        start = number * BLOCK_ELEMENTS
        return held.get(shard, tensor, start, start + BLOCK_ELEMENTS) is blocks[number]

    assert [found(number) for number in range(3)] == [True, True, False]
    assert held.get(shard, tensor, 0, 7) is None  # which is not the block
    assert [held.use(shard, tensor, 0) for _ in range(2)] == [True, False]
    held.forget(shard, tensor, users=2)
    assert held.has(shard, tensor)
    held.forget(shard, tensor, users=2)
    assert not held.has(shard, tensor)
    assert not found(1)
    held.hold(shard, tensor, 2 * BLOCK_ELEMENTS, blocks[2])
    assert found(2)


def test_a_block_that_is_another_one_when_it_is_read_again_is_an_error(models: Family, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.experts[0])
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    shard = checkpoint.shards[tensor.shard]
    check = BlockCheck(lambda *_: None, LearnedHashes(lambda *_: None))
    block = np.zeros(MIB, dtype=np.uint8)
    check.check(shard, tensor, 0, block)
    check.check(shard, tensor, 0, block)
    block[5] = 1
    with pytest.raises(SourceChangedError, match=r"block 0 of tensor 'model\.embed_tokens\.weight'"):
        check.check(shard, tensor, 0, block)


def test_hashes_of_a_tensor_are_kept_when_all_of_its_blocks_were_read_in_whatever_order(
    models: Family, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(models.experts[0])
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    shard = checkpoint.shards[tensor.shard]
    count = BlockGrid.of(tensor.shape).count
    assert count > 3
    with Catalog(tmp_path / "catalog") as catalog:
        learned = learned_hashes(catalog)
        for block in (2, *range(3, count), 0, 1):
            assert known_blocks(shard, tensor, catalog) is None
            assert learned.add(shard, tensor, count, block, bytes([block]) * 32)
        assert learned.add(shard, tensor, count, 1, b"\1" * 32)
        assert not learned.add(shard, tensor, count, 1, b"\2" * 32)
        catalog.flush()
        assert known_blocks(shard, tensor, catalog) == b"".join(bytes([block]) * 32 for block in range(count))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_is_divided_and_too_little_of_it_is_refused_with_what_is_needed() -> None:
    memory = Memory.of(2**31, 2)
    assert memory.cache + memory.held < 2**31
    assert memory.held > 2 * memory.cache
    with pytest.raises(UsageError, match=r"--memory 100 MiB is too little for 2 threads; give at least \d+ MiB, or"):
        Memory.of(100 * MIB, 2)
