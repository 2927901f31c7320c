"""Models that are merged from the same sources: each of their blocks is read once for all, within one cap on memory."""

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from hypothesis import given
from hypothesis import strategies as st
from lora import llama, train
from mounting import mounted_recipes, wait_for
from recipes import MERGES, recipe_document, write_document, write_recipe

from mergefs.catalog import Catalog
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.errors import SourceReadError
from mergefs.kernels.precision import Raw
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.unmount import read_status
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.recipe.variants import parse_variant, vary
from mergefs.sources import blocks
from mergefs.sources.cache import BlockCache
from mergefs.sources.place import StoredTensor

WEIGHTS = "model.safetensors"


def block(size: int, value: int = 0) -> Raw:
    return np.full(size, value, dtype=np.uint8)


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_block_of_a_source_goes_when_all_that_want_it_have_had_it() -> None:
    cache = BlockCache(1000)
    read: list[int] = []

    def source() -> Raw:
        read.append(1)
        return block(10, 7)

    for left in (2, 1, 0):
        assert cache.get_source("key", source, users=3).tolist() == [7] * 10
        assert cache.totals().source_cache_bytes == (10 if left else 0)
    assert len(read) == 1
    assert cache.totals().source_cache_hits == 2
    cache.get_source("key", source, users=3)
    assert len(read) == 2


def test_who_waits_for_a_block_of_a_source_has_had_it() -> None:
    cache = BlockCache(1000)
    begun, go_on = threading.Event(), threading.Event()
    read: list[int] = []

    def source() -> Raw:
        read.append(1)
        begun.set()
        assert go_on.wait(60)
        return block(10, 7)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cache.get_source, "key", source, 3)
        assert begun.wait(60)
        others = [pool.submit(cache.get_source, "key", source, 3) for _ in range(2)]
        wait_for(lambda: cache.totals().source_cache_hits == 2, "two users that wait for the block")
        go_on.set()
        assert all(future.result(60) is first.result(60) for future in others)
    assert len(read) == 1
    assert cache.totals().source_cache_bytes == 0


def test_a_source_that_cannot_be_read_fails_for_all_that_wait_and_is_tried_again_by_the_next() -> None:
    cache = BlockCache(1000)
    begun, go_on = threading.Event(), threading.Event()

    def fail() -> Raw:
        begun.set()
        assert go_on.wait(60)
        raise SourceReadError("no disk")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_source, "key", fail, 3)
        assert begun.wait(60)
        second = pool.submit(cache.get_source, "key", fail, 3)
        wait_for(lambda: cache.totals().source_cache_hits == 1, "a user that waits")
        go_on.set()
        for future in (first, second):
            with pytest.raises(SourceReadError):
                future.result(60)
    assert cache.get_source("key", lambda: block(5), 2).size == 5
    assert cache.totals().source_cache_bytes == 5, "one more user wants it"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 60)), max_size=60), st.integers(0, 120))
def test_both_kinds_of_blocks_stay_within_one_capacity_and_sources_within_half_of_it(
    wanted: Sequence[tuple[bool, int, int]], capacity: int
) -> None:
    cache = BlockCache(capacity)
    sizes: dict[tuple[bool, int], int] = {}
    for of_source, key, size in wanted:
        size = sizes.setdefault((of_source, key), size)
        if of_source:
            assert cache.get_source(("source", key), lambda size=size: block(size), 2).size == size
        else:
            assert cache.get(key, lambda size=size: block(size)).size == size
        totals = cache.totals()
        assert totals.source_cache_bytes <= capacity // 2
        assert 0 <= totals.source_cache_bytes <= totals.cache_bytes <= capacity


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=2)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """What the kernel was asked for of each file that is read as sources are."""
    counts: Counter[Path] = Counter()
    real, lock = os.preadv, threading.Lock()

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        done = real(descriptor, buffers, offset)
        with lock:
            counts[Path(f"/proc/self/fd/{descriptor}").readlink()] += done
        return done

    monkeypatch.setattr(os, "preadv", count)
    return counts


@pytest.fixture
def resources(tmp_path: Path) -> Iterator[Workspace]:
    made = Workspace.create(Catalog(tmp_path / "catalog"), 2**24)
    yield made
    made.close()


def variant(recipe: Path, text: str, resources: Workspace) -> ModelFiles:
    """Return the files of a variant of a recipe."""
    plan = make_plan(vary(load_recipe(recipe), parse_variant(text)), PlanOptions(), resources)
    return ModelFiles(plan, resources, strict=False)


def read(files: ModelFiles) -> bytes:
    return files.read(WEIGHTS, 0, files.sizes[WEIGHTS])


def tensor_bytes(models: Family) -> dict[Path, int]:
    """Return the bytes of tensors in each file of a family."""
    found: Counter[Path] = Counter()
    for directory in (models.base, *models.experts):
        checkpoint = open_checkpoint(directory)
        for tensor in checkpoint.tensors.values():
            found[checkpoint.shards[tensor.shard].path] += tensor.nbytes
    return dict(found)


def one_after_the_other(both: Sequence[ModelFiles]) -> list[bytes]:
    return [read(files) for files in both]


def at_once(both: Sequence[ModelFiles]) -> list[bytes]:
    with ThreadPoolExecutor(len(both)) as pool:
        return list(pool.map(read, both))


@pytest.mark.parametrize("how", [one_after_the_other, at_once])
def test_variants_read_each_byte_of_their_sources_once(
    models: Family,
    tmp_path: Path,
    resources: Workspace,
    counted: Counter[Path],
    how: Callable[[Sequence[ModelFiles]], list[bytes]],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    texts = ("lambda=0.5", "weight=0.2", "weight.1=0.9")
    alone = Workspace.create(Catalog(tmp_path / "another"), 0)
    expected = [read(variant(recipe, text, alone)) for text in texts]
    alone.close()
    variants = [variant(recipe, text, resources) for text in texts]
    counted.clear()
    assert how(variants) == expected
    assert counted == tensor_bytes(models)
    totals = resources.ledger.totals()
    assert totals.expert_bytes_read + totals.base_bytes_read == sum(counted.values())
    assert totals.expert_bytes_reread == 0
    assert resources.cache.totals().source_cache_bytes == 0, "all have had all of them"


def test_models_in_step_begin_with_different_inputs_so_that_none_waits_for_all_that_another_reads(
    models: Family, tmp_path: Path, resources: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []
    real = StoredTensor.read

    def note(place: StoredTensor, *arguments: Any) -> Raw:
        begun.append(place.shard.path.parent)
        return real(place, *arguments)

    recipe = load_recipe(write_recipe(tmp_path / "merge.yml", MERGES["ties"], models))
    variants = [
        ModelFiles(make_plan(recipe, PlanOptions(random_seed=seed), resources), resources, strict=True)
        for seed in range(3)
    ]
    for one in variants:
        for tensor in one.plan.tensors:
            one.engine.prepare_tensor(tensor)
    monkeypatch.setattr(StoredTensor, "read", note)
    tensor = next(name for name, planned in variants[0].plan.tensors.items() if planned.context is not None)
    orders = []
    for one in variants:
        begun.clear()
        one.engine.read_tensor(tensor, 0, 1)
        orders.append(tuple(begun))
    inputs = [models.base, *models.experts]
    assert all(sorted(order) == sorted(inputs) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    assert orders[1] == (*orders[0][1:], orders[0][0])


def test_nothing_of_a_source_is_kept_for_one_model_alone(models: Family, tmp_path: Path, resources: Workspace) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    files = variant(recipe, "lambda=0.5", resources)
    whole = read(files)
    totals = resources.cache.totals()
    assert totals.source_cache_bytes == totals.source_cache_hits == 0
    assert 0 < totals.cache_bytes <= len(whole)


def test_a_model_that_is_gone_wants_nothing_any_more(models: Family, tmp_path: Path, resources: Workspace) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    first, second = (variant(recipe, text, resources) for text in ("lambda=0.5", "weight=0.2"))
    del second
    gc.collect()
    read(first)
    assert resources.cache.totals().source_cache_bytes == 0


def test_models_that_share_some_of_their_sources_share_those_alone(
    models: Family, tmp_path: Path, resources: Workspace, counted: Counter[Path]
) -> None:
    """Both have the base, each an expert of its own."""
    both = []
    for number, expert in enumerate(models.experts):
        recipe = write_recipe(tmp_path / f"{number}.yml", MERGES["slerp"], Family(models.base, (expert,)))
        both.append(variant(recipe, "t=0.5", resources))
    for files in both:
        files.engine.prepare()
        for name in files.plan.tensors:
            files.engine.prepare_tensor(name)
    counted.clear()
    at_once(both)
    assert counted == tensor_bytes(models)


def test_what_is_kept_of_a_source_is_not_changed_by_who_puts_other_rows_into_it(
    tmp_path: Path, resources: Workspace
) -> None:
    """An adapter that replaces the rows of tokens, which are put over those of the model."""
    base = llama()(tmp_path / "base", torch.float32)
    adapter = train(
        base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}
    ).adapter
    plain = write_document(tmp_path / "plain.yml", _passthrough(str(base)))
    replaced = write_document(tmp_path / "replaced.yml", _passthrough(f"{base}+{adapter}"))
    expected = []
    for recipe in (replaced, plain):
        alone = Workspace.create(Catalog(tmp_path / f"alone-{recipe.stem}"), 0)
        expected.append(read(ModelFiles(make_plan(load_recipe(recipe), PlanOptions(), alone), alone, strict=False)))
        alone.close()
    both = [
        ModelFiles(make_plan(load_recipe(recipe), PlanOptions(), resources), resources, strict=False)
        for recipe in (replaced, plain)
    ]
    assert one_after_the_other(both) == expected
    assert expected[0] != expected[1]
    assert resources.cache.totals().source_cache_hits > 0


def _passthrough(model: str) -> dict[str, object]:
    return {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float32"}


def test_two_readers_of_two_variants_of_a_mount_have_each_expert_read_once(tmp_path: Path) -> None:
    models = family(
        tmp_path / "models",
        experts=2,
        dtype=torch.bfloat16,
        tied=False,
        shards=1,
        hidden=128,
        layers=1,
        vocabulary=5000,
    )
    document = recipe_document(MERGES["task_arithmetic"], models)
    write_document(tmp_path / "recipes" / "recipe.yml", document)
    names = ("recipe", "recipe@lambda=0.5", "recipe@weight.2=0.1")
    with mounted_recipes(tmp_path / "recipes", mountpoint=tmp_path / "mnt", state=tmp_path / "state") as mount:
        paths = [mount.mountpoint / name / WEIGHTS for name in names]
        sizes = [path.stat().st_size for path in paths]  # all are planned
        with ThreadPoolExecutor(3) as pool:
            assert [len(content) for content in pool.map(Path.read_bytes, paths)] == sizes
        entry = find_mount(mount.mountpoint)
        assert entry is not None
        status = read_status(entry)
    by_file = tensor_bytes(models)
    assert status["base_bytes_read"] == by_file[models.base / WEIGHTS]
    assert status["expert_bytes_read"] == sum(by_file[expert / WEIGHTS] for expert in models.experts)
    assert status["expert_bytes_reread"] == 0
    assert status["source_cache_bytes"] == 0
