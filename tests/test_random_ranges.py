"""Any byte range of a merged file, in any order, from any number of processes, is what was materialized."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import METHODS, Families, FamilyKind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import mounted_recipes
from range_reader import Range, digest, map_ranges, read_ranges
from recipes import recipe_document, write_document
from tensors import bits

import mergefs
from mergefs.api import MergedModel
from mergefs.catalog import Catalog
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.materialize.materialize import materialize
from mergefs.methods import registry
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks

pytestmark = pytest.mark.mounts

# Three blocks of embedding, the last one ragged, and small tensors that share pages with their neighbours.
KIND = FamilyKind(torch.bfloat16, tied=True, hidden=128, layers=1, vocabulary=10007)
FILE = "model.safetensors"
PROCESSES = 3

# A busy machine must not fail a test.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, slots=True)
class Served:
    """One merge: its recipe, its mount, and the bytes of its weight file as they were materialized."""

    recipe: Path
    mounted: Path
    content: bytes

    def expected(self, ranges: list[Range]) -> list[str]:
        """Return the digests of ranges of the materialized file."""
        return [digest(self.content[offset : offset + size]) for offset, size in ranges]


@pytest.fixture(scope="module", params=["ties", "dare_ties"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, catalogs: Path, families: Families
) -> Iterator[Served]:
    """Materialize a merge in this process and mount it in another that has to gather everything anew."""
    root = tmp_path_factory.mktemp(f"ranges-{request.param}")
    recipe = write_document(root / "recipe.yml", recipe_document(METHODS[request.param], families(KIND)))
    with mergefs.open(recipe, catalog=catalogs / f"{root.name}-1") as model:
        materialize(model.plan, root / "out", model._resources)
    extra = {"MERGEFS_CATALOG": str(catalogs / f"{root.name}-2")}
    with mounted_recipes(
        recipe, mountpoint=root / "mnt", state=root / "state", options=["--cache-size", "64MiB"], extra=extra
    ):
        yield Served(recipe, root / "mnt" / FILE, (root / "out" / FILE).read_bytes())


@pytest.fixture(scope="module")
def engine(served: Served, catalogs: Path) -> Iterator[Engine]:
    """Give an engine whose cache is too small for two blocks, so that most reads compute."""
    resources = Workspace.create(Catalog(catalogs / f"{served.recipe.parent.name}-3"), 3 * 2**19)
    yield Engine(make_plan(load_recipe(served.recipe), PlanOptions(), resources), resources, strict=False)
    resources.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Give readers in processes of their own."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def offsets_near(size: int) -> st.SearchStrategy[int]:
    """Return places in a file: anywhere, and around the borders of pages, of the header, of blocks, and of the end."""
    borders = [0, 4096, 8192, 2**17, 2**20, 4096 + 2**20, 4096 + 2 * 2**20, size]
    near = st.builds(lambda border, step: border + step, st.sampled_from(borders), st.integers(-5, 5))
    return (st.integers(0, size) | near).map(lambda offset: min(max(offset, 0), size))


def ranges_of(size: int, longest: int = 2**21) -> st.SearchStrategy[list[Range]]:
    """Return lists of ranges, which may be empty, overlap, repeat, and reach beyond the end."""
    sizes = st.integers(0, 64) | st.integers(0, longest)
    return st.lists(st.tuples(offsets_near(size), sizes), min_size=1, max_size=6)


@UNTIMED
@given(data=st.data())
def test_ranges_of_the_mounted_file_are_the_materialized_bytes(served: Served, data: st.DataObject) -> None:
    ranges = data.draw(ranges_of(len(served.content)))
    assert read_ranges(str(served.mounted), ranges) == served.expected(ranges)


@UNTIMED
@given(data=st.data())
def test_a_mapping_of_the_mounted_file_shows_the_materialized_bytes(
    served: Served, processes: ProcessPoolExecutor, data: st.DataObject
) -> None:
    """The mapping lives in another process, which a file that is too short would kill."""
    ranges = data.draw(ranges_of(len(served.content)))
    assert processes.submit(map_ranges, str(served.mounted), ranges).result() == served.expected(ranges)


@settings(UNTIMED, max_examples=30)
@given(data=st.data())
def test_several_processes_at_once_each_read_the_materialized_bytes(
    served: Served, processes: ProcessPoolExecutor, data: st.DataObject
) -> None:
    """The page cache is dropped in between, so that the server and not the kernel answers."""
    descriptor = os.open(served.mounted, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    lists = [data.draw(ranges_of(len(served.content))) for _ in range(PROCESSES)]
    ways = [data.draw(st.sampled_from([read_ranges, map_ranges])) for _ in lists]
    waiting = [processes.submit(way, str(served.mounted), ranges) for way, ranges in zip(ways, lists, strict=True)]
    assert [future.result() for future in waiting] == [served.expected(ranges) for ranges in lists]


def test_the_whole_file_backwards_in_odd_pieces_is_the_materialized_file(served: Served) -> None:
    step = 65_521
    pieces = [(offset, step) for offset in range(0, len(served.content), step)][::-1]
    assert read_ranges(str(served.mounted), pieces) == served.expected(pieces)


# Without a mount


def test_no_method_escapes_the_tests_over_all_methods() -> None:
    """Those of random ranges, of blocks, shards and threads, of mergekit's results: they all go over the examples."""
    assert set(METHODS) == set(registry.METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_any_range_of_a_merge_by_any_method_is_what_the_whole_file_holds_there(
    tmp_path: Path, families: Families, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing is cached, and blocks are so small that most ranges cut some."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 160)
    recipe = load_recipe(
        write_document(tmp_path / "recipe.yml", recipe_document(METHODS[name], families(FamilyKind())))
    )
    resources = Workspace.create(Catalog(tmp_path / "catalog"), 0)
    engine = Engine(make_plan(recipe, PlanOptions(), resources), resources, strict=False)
    (file,) = engine.plan.files
    whole = engine.read_file(FILE, 0, file.size)
    chance = random.Random(1)
    for _ in range(150):
        offset, size = chance.randrange(file.size), chance.choice([1, 2, 7, 64, 321, 3000])
        assert engine.read_file(FILE, offset, size) == whole[offset : offset + size]
    resources.close()


@UNTIMED
@given(data=st.data())
def test_the_engine_computes_any_range_by_itself(served: Served, engine: Engine, data: st.DataObject) -> None:
    for offset, size in data.draw(ranges_of(len(served.content))):
        assert engine.read_file(FILE, offset, size) == served.content[offset : offset + size]


@settings(UNTIMED, max_examples=30)
@given(data=st.data())
def test_threads_share_an_engine(served: Served, engine: Engine, data: st.DataObject) -> None:
    ranges = data.draw(st.lists(ranges_of(len(served.content)), min_size=2, max_size=4))
    with ThreadPoolExecutor(len(ranges)) as pool:
        found = list(pool.map(lambda some: [digest(engine.read_file(FILE, *one)) for one in some], ranges))
    assert found == [served.expected(some) for some in ranges]


@pytest.fixture(scope="module")
def model(served: Served, catalogs: Path) -> Iterator[MergedModel]:
    """Give the merged model without a mount."""
    with mergefs.open(served.recipe, catalog=catalogs / f"{served.recipe.parent.name}-4") as opened:
        yield opened


def slices_of(length: int) -> st.SearchStrategy[slice]:
    """Return slices that go forward, also beyond both ends."""
    bound = st.none() | st.integers(-length - 2, length + 2)
    return st.builds(slice, bound, bound, st.none() | st.integers(1, length + 1))


def indices_of(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Return what a tensor of ``shape`` may be indexed with."""
    entries = [st.integers(-length, length - 1) | slices_of(length) for length in shape]
    tuples = st.integers(0, len(shape)).flatmap(lambda count: st.tuples(*entries[:count]))
    with_ellipsis = st.just(...) | tuples.map(lambda found: (*found, ...))
    return entries[0] | tuples | with_ellipsis


@UNTIMED
@given(data=st.data())
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_slice_is_what_torch_cuts_out_of_the_whole_tensor(model: MergedModel, name: str, data: st.DataObject) -> None:
    whole, part = model.get_tensor(name), model.get_slice(name)
    assert part.get_shape() == list(whole.shape)
    assert part.get_dtype() == "BF16"
    index = data.draw(indices_of(tuple(whole.shape)))
    cut, expected = part[index], whole[index]
    assert cut.shape == expected.shape
    assert cut.dtype == expected.dtype
    assert torch.equal(bits(cut), bits(expected))


@settings(UNTIMED, max_examples=30)
@given(start=st.integers(0, 10006), rows=st.integers(0, 300))
def test_a_slice_across_blocks_is_what_torch_cuts_out(model: MergedModel, start: int, rows: int) -> None:
    name = "model.embed_tokens.weight"
    cut = model.get_slice(name)[start : start + rows]
    assert torch.equal(bits(cut), bits(model.get_tensor(name)[start : start + rows]))


@pytest.mark.parametrize("index", [10007, -10008])
def test_an_index_outside_the_tensor_is_refused_as_by_torch(model: MergedModel, index: int) -> None:
    with pytest.raises(IndexError):
        model.get_slice("model.embed_tokens.weight")[index]


def test_slices_that_go_backward_are_refused_as_by_torch(model: MergedModel) -> None:
    with pytest.raises(ValueError, match="forward"):
        model.get_slice("model.embed_tokens.weight")[::-1]


def test_a_slice_reads_no_more_than_the_blocks_that_hold_it(served: Served, tmp_path: Path) -> None:
    with mergefs.open(served.recipe, catalog=tmp_path / "catalog") as opened:
        name = "model.embed_tokens.weight"
        opened.files.engine.prepare_tensor(name)
        opened.get_slice(name)[5:7]
        plan = opened.plan.tensors[name]
        assert opened.bytes_read["expert_bytes_read"] == 2 * plan.grid.step * plan.dtype.itemsize
