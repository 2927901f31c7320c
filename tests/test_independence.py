"""Merged bytes depend on the recipe alone.

Not on the size of blocks, the kernels, the shards of the inputs, the threads, order and size of reads, the room in the
cache, or whether statistics were known before. ``test_same_bytes`` varies one of them at a time; here they vary
together.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from examples import METHODS
from recipes import recipe_document, write_document
from test_structure import chained, sliced, source
from test_structure_reading import ties_of_ties_of_ties
from tokenizers_recipes import quick_builder
from worlds import World, make_world

from mergefs.catalog import Catalog
from mergefs.engine import compute, merging
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks
from mergefs.statistics import row_means, thresholds

pytestmark = pytest.mark.usefixtures("quick_builder")
__all__ = ["quick_builder"]

FILE: Final = "model.safetensors"
DTYPES: Final = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
READS: Final = 20


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Everything that must make no difference."""

    elements: int  # of a block
    threads: int
    cache: int  # bytes
    shards: int
    fused: bool
    known: bool  # whether the catalog has all statistics already

    @property
    def text(self) -> str:
        """Name the circumstances, for test ids."""
        kernels = "fused" if self.fused else "reference"
        statistics = "known" if self.known else "lazy"
        return f"{self.elements}-{self.threads}-threads-{self.cache}-{self.shards}-shards-{kernels}-{statistics}"


LARGE: Final = 2**26
# Every two values of two circumstances meet in one of them.
CIRCUMSTANCES: Final = (
    Circumstances(elements=64, threads=8, cache=0, shards=3, fused=True, known=False),
    Circumstances(elements=64, threads=1, cache=LARGE, shards=1, fused=False, known=True),
    Circumstances(elements=512, threads=1, cache=0, shards=1, fused=True, known=True),
    Circumstances(elements=512, threads=8, cache=LARGE, shards=3, fused=False, known=False),
    Circumstances(elements=blocks.BLOCK_ELEMENTS, threads=8, cache=0, shards=1, fused=False, known=False),
    Circumstances(elements=blocks.BLOCK_ELEMENTS, threads=1, cache=LARGE, shards=3, fused=True, known=False),
    Circumstances(elements=blocks.BLOCK_ELEMENTS, threads=8, cache=LARGE, shards=1, fused=True, known=True),
    Circumstances(elements=64, threads=8, cache=0, shards=3, fused=False, known=True),
)


def test_every_two_circumstances_meet() -> None:
    fields = Circumstances.__slots__
    for first in fields:
        for second in fields:
            values = [{getattr(one, name) for one in CIRCUMSTANCES} for name in (first, second)]
            met = {(getattr(one, first), getattr(one, second)) for one in CIRCUMSTANCES}
            assert first == second or len(met) == len(values[0]) * len(values[1]), (first, second)


Worlds = Callable[[torch.dtype, int], World]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Return a function that writes the models of a dtype in so many shards, once."""

    @functools.cache
    def make(dtype: torch.dtype, shards: int) -> World:
        return make_world(tmp_path_factory.mktemp("world"), dtype, shards)

    return make


def one_kind_of_blocks_and_kernels(patch: pytest.MonkeyPatch, elements: int, fused: bool) -> None:
    """Cut tensors into blocks of ``elements``, and compute them with fused kernels or by the formulas."""
    patch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    patch.setattr(row_means, "BLOCK_ELEMENTS", elements)
    if not fused:
        patch.setattr(merging, "run_kernel", functools.partial(compute.run_kernel, fused=False))
        patch.setattr(compute, "FUSED_DTYPES", frozenset())
        patch.setattr(thresholds, "FUSED_DTYPES", frozenset())


class Merge:
    """A recipe for each kind of shards, merged under given circumstances."""

    def __init__(self, directory: Path, document: Callable[[World], Any], dtype: torch.dtype, worlds: Worlds) -> None:
        self._directory = directory
        self._recipes = {
            shards: write_document(directory / f"{shards}.yml", document(worlds(dtype, shards))) for shards in (1, 3)
        }
        self._opened: list[Workspace] = []

    def engine(self, catalog: str, cache: int, shards: int) -> Engine:
        """Return a fresh engine, whose catalog has what other engines of that ``catalog`` have gathered."""
        workspace = Workspace.create(Catalog(self._directory / catalog), cache)
        self._opened.append(workspace)
        plan = make_plan(load_recipe(self._recipes[shards]), PlanOptions(), workspace)
        return Engine(plan, workspace, strict=False)

    def close(self) -> None:
        """Close all engines that are open."""
        while self._opened:
            self._opened.pop().close()

    def whole(self) -> bytes:
        """Return the file as one plain read gives it."""
        plain = self.engine("plain", LARGE, 1)
        (file,) = plain.plan.files
        content = plain.read_file(FILE, 0, file.size)
        assert len(content) == file.size
        self.close()
        return content

    def check(self, expected: bytes, given: Circumstances, number: int) -> None:
        """Read the file anew under the circumstances, in ranges in a random order, and compare them."""
        catalog = f"catalog-{number}"
        if given.known:
            before = self.engine(catalog, LARGE, given.shards)
            for name in before.plan.tensors:
                before.prepare_tensor(name)
            self.close()
        reader = self.engine(catalog, given.cache, given.shards)
        chance = random.Random(number)
        # Ranges that cover the file, and some more across them.
        borders = sorted({0, len(expected), *(chance.randrange(len(expected)) for _ in range(READS))})
        ranges = [*itertools.pairwise(borders)]
        ranges += [(start, start + chance.randrange(1, 1500)) for start in chance.sample(range(len(expected)), READS)]
        chance.shuffle(ranges)

        def differs(bounds: tuple[int, int]) -> bool:
            return reader.read_file(FILE, bounds[0], bounds[1] - bounds[0]) != expected[bounds[0] : bounds[1]]

        with ThreadPoolExecutor(given.threads) as pool:
            different = [bounds for bounds, bad in zip(ranges, pool.map(differs, ranges), strict=True) if bad]
        gathered = reader._resources.ledger.totals().analysis_bytes_read
        self.close()
        assert different == [], given.text
        assert gathered == 0 or not given.known


def assert_independent(merge: Merge) -> None:
    expected = merge.whole()
    for number, given in enumerate(CIRCUMSTANCES):
        with pytest.MonkeyPatch.context() as patch:
            one_kind_of_blocks_and_kernels(patch, given.elements, given.fused)
            merge.check(expected, given, number)


@pytest.fixture
def place(catalogs: Path, tmp_path: Path) -> Iterator[Path]:
    """Give a directory in memory for recipes and catalogs."""
    directory = catalogs / f"independence-{tmp_path.name}"
    directory.mkdir()
    yield directory


@DTYPES
@pytest.mark.parametrize("name", METHODS)
def test_circumstances_make_no_difference_to_a_method(
    place: Path, worlds: Worlds, name: str, dtype: torch.dtype
) -> None:
    def document(world: World) -> Any:
        return recipe_document(METHODS[name], world.family)

    assert_independent(Merge(place, document, dtype, worlds))


def ties_of_adapted(world: World) -> Any:
    models = [(world.adapted, 0.7), (str(world.second), 0.4)]
    return {
        "merge_method": "ties",
        "base_model": str(world.base),
        "models": [{"model": model, "parameters": {"weight": weight, "density": 0.4}} for model, weight in models],
    }


def union_of_vocabularies(world: World) -> Any:
    models = [(world.first, 0.7), (world.foreign, 0.4)]
    return {
        "merge_method": "ties",
        "base_model": str(world.base),
        "models": [{"model": str(model), "parameters": {"weight": weight, "density": 0.4}} for model, weight in models],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 16, "tokens": {"v5": {"source": str(world.foreign)}}},
    }


def union_of_an_adapted_merge(world: World) -> Any:
    inner = {**ties_of_adapted(world), "name": "inner"}
    slerp = {
        "merge_method": "slerp",
        "base_model": "inner",
        "models": [{"model": str(world.foreign)}],
        "parameters": {"t": [0.2, 0.8]},
        "tokenizer_source": "union",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    return [inner, slerp]


def stacked_karcher(world: World) -> Any:
    return sliced(
        [source(world.first, 0, 2), source(world.second, 1, 3)],
        [source(world.second, 0, 2), source(world.first, 0, 2)],
        merge_method="karcher",
        parameters={"max_iter": 3},
    )


def stacked_slerp(world: World) -> Any:
    return sliced(
        [source(world.base, 0, 2), source(world.first, 1, 3)],
        [source(world.base, 1, 3), source(world.second, 0, 2)],
        merge_method="slerp",
        base_model=str(world.base),
        parameters={"t": [0.2, 0.8]},
    )


STRUCTURES: Final[dict[str, Callable[[World], Any]]] = {
    "adapter": ties_of_adapted,
    "union": union_of_vocabularies,
    "adapter, merge and union": union_of_an_adapted_merge,
    "slices of directions": stacked_karcher,
    "slices of interpolations": stacked_slerp,
    "merge of a merge": lambda world: chained(world.family, "inner"),
    "merge of a merge of a merge": lambda world: ties_of_ties_of_ties(world.family),
}


@DTYPES
@pytest.mark.parametrize("structure", STRUCTURES)
def test_circumstances_make_no_difference_to_a_structure(
    place: Path, worlds: Worlds, structure: str, dtype: torch.dtype
) -> None:
    assert_independent(Merge(place, STRUCTURES[structure], dtype, worlds))
