"""The engine's parts: a cache that computes each block once, memory that is bounded, and honest accounts."""

import logging
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import set_element
from checkpoints import Family, family
from hypothesis import given, settings
from hypothesis import strategies as st
from mounting import wait_for
from recipes import MERGES, stand_in, write_recipe

from mergefs.api import MergedModel, open_model
from mergefs.catalog import Catalog
from mergefs.engine.engine import Engine
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.room import Room
from mergefs.engine.workspace import Workspace
from mergefs.errors import NonFiniteError
from mergefs.kernels.precision import Raw
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks
from mergefs.sources.cache import BlockCache

WEIGHTS = "model.safetensors"


def block(size: int, value: int = 0) -> Raw:
    return np.full(size, value, dtype=np.uint8)


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_block_is_computed_once_however_many_threads_want_it() -> None:
    cache = BlockCache(1000)
    begun, go_on = threading.Event(), threading.Event()
    computed: list[int] = []

    def compute() -> Raw:
        computed.append(1)
        begun.set()
        assert go_on.wait(60)
        return block(10, 7)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.get, "key", compute)
        assert begun.wait(60)
        others = [pool.submit(cache.get, "key", compute) for _ in range(7)]
        wait_for(lambda: cache.totals().cache_hits == 7, "seven readers that wait for the block")
        go_on.set()
        assert all(future.result(60) is first.result(60) for future in others)
    assert len(computed) == 1
    assert cache.totals().cache_misses == 1


def test_an_error_reaches_every_reader_that_waits_and_the_next_one_tries_again() -> None:
    cache = BlockCache(1000)
    begun, go_on = threading.Event(), threading.Event()

    def fail() -> Raw:
        begun.set()
        assert go_on.wait(60)
        raise OSError("the disk is on fire")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get, "key", fail)]
        assert begun.wait(60)
        futures += [pool.submit(cache.get, "key", fail) for _ in range(3)]
        wait_for(lambda: cache.totals().cache_hits == 3, "three readers that wait for the block")
        go_on.set()
        assert [str(future.exception(60)) for future in futures] == ["the disk is on fire"] * 4
    assert cache.get("key", lambda: block(5, 1)).tolist() == [1] * 5


@given(
    capacity=st.integers(1, 200),
    requests=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 100)), max_size=60),
)
@settings(max_examples=100, deadline=None)
def test_the_cache_never_holds_more_than_its_capacity_and_drops_what_was_not_used_longest(
    capacity: int, requests: list[tuple[int, int]]
) -> None:
    cache = BlockCache(capacity)
    sizes: dict[int, int] = {}
    expected: list[int] = []  # the least recently used first
    for key, size in requests:
        size = sizes.setdefault(key, size)
        computed: list[int] = []

        def compute(size: int = size, computed: list[int] = computed) -> Raw:
            computed.append(1)
            return block(size)

        assert cache.get(key, compute).size == size
        assert bool(computed) == (key not in expected)
        expected = [kept for kept in expected if kept != key] + [key]
        while sum(sizes[kept] for kept in expected) > capacity:
            expected.pop(0)
        assert cache.totals().cache_bytes == sum(sizes[kept] for kept in expected) <= capacity


def test_threads_that_want_different_blocks_all_get_theirs_within_the_capacity() -> None:
    cache = BlockCache(40 * 10)

    def read(worker: int) -> None:
        for number in range(200):
            key = (number * 7 + worker) % 60
            assert cache.get(key, lambda key=key: block(10, key)).tolist() == [key] * 10  # type: ignore[misc]
            assert cache.totals().cache_bytes <= 400

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(read, worker) for worker in range(6)]:
            future.result(120)


# Memory to work in ----------------------------------------------------------------------------------------------------


def test_no_more_memory_is_lent_than_there_is_nor_to_more_threads_than_may_work() -> None:
    room = Room(100, workers=3)
    lock = threading.Lock()
    lent: list[int] = []
    peaks: list[tuple[int, int]] = []

    def work(size: int) -> None:
        with room.reserve(size):
            with lock:
                lent.append(size)
                peaks.append((sum(lent), len(lent)))
            with lock:
                lent.remove(size)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, size) for size in [10, 40, 60, 30] * 50]:
            future.result(60)
    assert max(total for total, _ in peaks) <= 100
    assert max(count for _, count in peaks) <= 3


def test_who_needs_more_memory_than_there_is_waits_until_nobody_else_has_any() -> None:
    room = Room(100, workers=3)
    entered = threading.Event()

    def work() -> None:
        with room.reserve(1000):
            entered.set()

    thread = threading.Thread(target=work)
    with room.reserve(1):
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(60)
    thread.join()


def test_who_waits_for_much_memory_is_not_passed_by_those_who_want_little() -> None:
    room = Room(100, workers=8)
    order: list[int] = []

    def work(size: int) -> None:
        with room.reserve(size):
            order.append(size)

    threads = []
    with room.reserve(60):
        for number, size in enumerate((90, 40, 5)):
            threads.append(threading.Thread(target=work, args=(size,)))
            threads[-1].start()
            wait_for(lambda: len(room._queue) == number + 1, "one more that waits")  # noqa: B023
        assert order == []
    for thread in threads:
        thread.join(60)
    assert order[0] == 90
    assert sorted(order) == [5, 40, 90]


def test_who_gives_up_waiting_holds_up_nobody() -> None:
    room = Room(100, workers=8)
    main, interrupted = threading.main_thread(), []

    def interrupt() -> None:
        wait_for(lambda: len(room._queue) == 1, "one that waits")
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGINT)

    with room.reserve(60):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt), room.reserve(50):
            interrupted.append("has been lent")
        thread.join()
        with room.reserve(40):
            pass
    with room.reserve(100):
        assert interrupted == []


def test_memory_comes_back_when_the_work_fails() -> None:
    room = Room(100, workers=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), room.reserve(100):
            raise ZeroDivisionError
    with room.reserve(100):
        pass


def test_who_has_been_lent_memory_does_not_wait_for_those_who_wait_for_it(models: Family, tmp_path: Path) -> None:
    """A mount may show a merge that is an input of another one, too: that holds memory when it needs its blocks."""
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models))
    plan = make_plan(recipe, PlanOptions(), resources)
    shown, inner = Engine(plan, resources, strict=False), resources.compute(plan)
    name = next(iter(plan.tensors))
    with ThreadPoolExecutor(2) as pool:
        with resources.room.reserve(2**40):
            waiting = pool.submit(shown.read_tensor, name, 0, 100)
            wait_for(lambda: len(resources.room._queue) == 1, "a reader that waits for memory")
            found = pool.submit(inner.read_tensor, name, 0, 100).result(60)
        assert np.array_equal(waiting.result(60), found)
    resources.close()


# Accounts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=2)


def open_with_cache(recipe: Path, size: int, budget: str | None = None, base: str | None = None) -> MergedModel:
    resources = Workspace.create(Catalog(recipe.parent / "catalog"), size)
    plan = make_plan(load_recipe(recipe), PlanOptions(budget, base), resources)
    return MergedModel(plan, resources)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("budget", [None, "40%"])
def test_what_a_cache_has_dropped_is_read_again_on_an_account_of_its_own(
    models: Family, tmp_path: Path, name: str, budget: str | None
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], models)
    with open_with_cache(recipe, 1, budget, stand_in(MERGES[name], models)) as model:
        first = model.read_file(WEIGHTS)
        after_one = model.bytes_read
        assert model.read_file(WEIGHTS) == first
        after_two = model.bytes_read
        planned = model.plan.outcome
    assert after_one["expert_bytes_read"] == after_two["expert_bytes_read"] == planned.expert_bytes_planned
    assert (after_one["expert_bytes_reread"], after_two["expert_bytes_reread"]) == (0, planned.expert_bytes_planned)
    assert after_two["base_bytes_read"] == 2 * after_one["base_bytes_read"] == 2 * planned.base_bytes
    assert after_two["analysis_bytes_read"] == after_one["analysis_bytes_read"]
    assert after_two["bytes_served"] == 2 * len(first)


def test_what_the_cache_keeps_is_not_read_again(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    with open_model(recipe) as model:
        first = model.read_file(WEIGHTS)
        before = model.bytes_read
        assert model.read_file(WEIGHTS) == first
        assert dict(model.bytes_read) == {**before, "bytes_served": 2 * len(first)}


def test_threads_that_read_the_same_file_pay_for_each_block_once(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    with open_model(recipe, budget="50%") as model:
        with ThreadPoolExecutor(6) as pool:
            contents = set(pool.map(lambda _: model.read_file(WEIGHTS), range(12)))
        assert len(contents) == 1
        assert model.bytes_read["expert_bytes_read"] == model.plan.outcome.expert_bytes_planned
        assert model.bytes_read["expert_bytes_reread"] == 0


def test_reading_one_tensor_reads_no_other(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe) as model:
        model.get_tensor("model.norm.weight")
        assert model.bytes_read["expert_bytes_read"] == 2 * 32 * 2
        assert model.bytes_read["base_bytes_read"] == 32 * 2
        assert model.bytes_read["analysis_bytes_read"] == 0


# What is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mount_serves_what_is_not_finite_and_says_so_once_and_a_writer_refuses(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    made = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    set_element(made.experts[1], "model.norm.weight", value)
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], made)
    caplog.set_level(logging.WARNING)
    with open_with_cache(recipe, 1) as model:
        for _ in range(2):
            merged = model.get_tensor("model.norm.weight")
        assert merged.isfinite().logical_not().nonzero().flatten().tolist() == [2]
    (record,) = [record.getMessage() for record in caplog.records]
    assert "tensor 'model.norm.weight'" in record
    assert str(made.experts[1] / WEIGHTS) in record

    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    plan = make_plan(load_recipe(recipe), PlanOptions(), resources)
    files = ModelFiles(plan, resources, strict=True)
    with pytest.raises(NonFiniteError) as caught:
        files.read(WEIGHTS, 0, files.sizes[WEIGHTS])
    assert str(caught.value) == record
    resources.close()


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MergedModel]:
    directory = tmp_path_factory.mktemp("opened")
    made = family(directory, experts=2, dtype=torch.bfloat16, tied=True, shards=1)
    recipe = write_recipe(directory / "recipe.yml", MERGES["ties"], made)
    with open_model(recipe, catalog=directory / "catalog") as model:
        yield model


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_range_of_a_file_is_that_part_of_the_whole(opened: MergedModel, data: st.DataObject) -> None:
    whole = opened.read_file(WEIGHTS)
    offset = data.draw(st.integers(0, len(whole) + 10))
    size = data.draw(st.integers(0, len(whole) + 10))
    assert opened.files.read(WEIGHTS, offset, size) == whole[offset : offset + size]
