"""What the mount serves, what ``mergefs.open`` returns and what ``materialize`` writes are the same bytes.

They depend on the recipe and on the models' tensors, and on nothing else: not on how the models are sharded, the order
of reads, the size of the cache, or the number of threads.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from examples import METHODS, Families, FamilyKind
from mounting import mounted_recipes, run_mergefs
from recipes import recipe_document, write_document
from sentences import said_by
from tensors import differing, load_model

import mergefs
from mergefs.catalog import Catalog
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.materialize.manifest import MANIFEST_NAME, manifest_hash, read_manifest
from mergefs.materialize.materialize import materialize
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks

pytestmark = pytest.mark.mounts


@dataclass(frozen=True, slots=True)
class Example:
    """A method on a kind of family, merged into one file or into shards."""

    method: str
    kind: FamilyKind
    sharded_output: bool

    @property
    def name(self) -> str:
        """The name of the recipe, and so of its directory in the mount."""
        return f"{self.method}-{self.kind.text}-{'shards' if self.sharded_output else 'file'}"

    @property
    def max_shard_size(self) -> str:
        """How large a shard of the merged model may be."""
        return "20KB" if self.sharded_output else "5GB"


EXAMPLES = [
    Example(method, FamilyKind(dtype, tied, shards), sharded_output=tied == (shards > 1))
    for method in METHODS
    for dtype in (torch.bfloat16, torch.float32)
    for tied in (True, False)
    for shards in (1, 3)
]


@dataclass(frozen=True, slots=True)
class Mounted:
    """The recipes and the mounts of all examples."""

    recipes: Path
    mountpoints: Mapping[bool, Path]  # by whether the output is sharded
    catalog: Path

    def recipe(self, example: Example) -> Path:
        """Return the recipe of an example."""
        return self.recipes / f"{example.name}.yml"

    def directory(self, example: Example) -> Path:
        """Return the mounted model of an example."""
        return self.mountpoints[example.sharded_output] / example.name


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory, catalogs: Path, families: Families) -> Iterator[Mounted]:
    """Mount all examples, by the real command: those with one output file at one place, the others at another."""
    root = tmp_path_factory.mktemp("same-bytes")
    found = Mounted(root, {False: root / "file", True: root / "shards"}, catalogs / "same-bytes")
    for example in EXAMPLES:
        write_document(found.recipe(example), recipe_document(METHODS[example.method], families(example.kind)))

    def mount(sharded: bool) -> Any:
        group = [example for example in EXAMPLES if example.sharded_output == sharded]
        return mounted_recipes(
            *(found.recipe(example) for example in group),
            mountpoint=found.mountpoints[sharded],
            state=root / "state",
            options=["--max-shard-size", group[0].max_shard_size],
            extra={"MERGEFS_CATALOG": str(found.catalog)},
        )

    with mount(False), mount(True):
        yield found


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory but the manifest, which only a materialized model has."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def weights(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_mount_open_and_materialize_give_the_same_bytes(mounted: Mounted, tmp_path: Path, example: Example) -> None:
    with mergefs.open(mounted.recipe(example), catalog=mounted.catalog, max_shard_size=example.max_shard_size) as model:
        materialize(model.plan, tmp_path / "out", model._resources)
        written = file_bytes(tmp_path / "out")
        assert len(weights(written)) == 1 or example.sharded_output
        assert len(weights(written)) > 1 or not example.sharded_output
        assert {name: model.read_file(name) for name in model.files.sizes} == written
        opened = {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)
    assert file_bytes(mounted.directory(example)) == written
    assert differing(opened, load_model(mounted.directory(example))) == {}
    assert ("lm_head.weight" in opened) is not example.kind.tied


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_commands_give_the_same_files_whatever_is_known_of_the_inputs(
    families: Families, tmp_path: Path, method: str
) -> None:
    """Nothing has been hashed when the model is mounted and opened first; `mergefs materialize` hashes; both go on."""
    recipe = write_document(tmp_path / "recipe.yml", recipe_document(METHODS[method], families(FamilyKind(shards=2))))
    catalog = tmp_path / "catalog"

    def opened() -> dict[str, bytes]:
        with mergefs.open(recipe, catalog=catalog) as model:
            return {name: model.read_file(name) for name in model.files.sizes}

    def run(*arguments: str | Path) -> None:
        result = run_mergefs(*arguments, state=tmp_path / "state", extra={"MERGEFS_CATALOG": str(catalog)})
        assert result.returncode == 0, result.stderr

    with mounted_recipes(
        recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", extra={"MERGEFS_CATALOG": str(catalog)}
    ):
        assert os.getxattr(tmp_path / "mnt", "user.mergefs.plan_id").startswith(b"local-")
        found = [file_bytes(tmp_path / "mnt"), opened()]
        run("materialize", recipe, tmp_path / "out")
        found += [file_bytes(tmp_path / "out"), file_bytes(tmp_path / "mnt"), opened()]
    run("analyze", recipe)
    run("materialize", recipe, tmp_path / "again")
    found += [file_bytes(tmp_path / "again"), opened()]
    assert all(files == found[0] for files in found[1:])
    assert b"local-" not in found[0]["mergefs.json"]
    assert manifest_hash(tmp_path / "out") == manifest_hash(tmp_path / "again") is not None


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_another_machine_gives_the_same_files_and_the_same_manifest(tmp_path: Path, method: str) -> None:
    """Another catalog, where the inputs were analysed; other places, inodes and times, and other shards."""
    kept = []
    for shards, analysed in ((1, False), (3, True)):
        place = tmp_path / f"machine-{shards}"
        models = family(place, experts=2, dtype=torch.bfloat16, tied=False, shards=shards)
        relative = Family(Path(models.base.name), tuple(Path(expert.name) for expert in models.experts))
        write_document(place / "recipe.yml", recipe_document(METHODS[method], relative))
        for path in place.rglob("*.safetensors"):
            os.utime(path, ns=(shards, shards * 10**9))
        where: dict[str, Any] = {
            "state": place / "state",
            "cwd": place,
            "extra": {"MERGEFS_CATALOG": str(place / "catalog")},
        }
        commands = [("analyze", "recipe.yml")] * analysed + [("materialize", "recipe.yml", "out")]
        with mounted_recipes(Path("recipe.yml"), mountpoint=place / "mnt", **where):
            for command in commands:
                result = run_mergefs(*command, **where)
                assert result.returncode == 0, result.stderr
            assert file_bytes(place / "mnt") == file_bytes(place / "out")
        kept.append((file_bytes(place / "out"), manifest_hash(place / "out")))
    assert kept[0] == kept[1]
    assert kept[0][1] is not None


@pytest.mark.parametrize("name", METHODS)
def test_how_the_models_are_sharded_makes_no_difference(tmp_path: Path, families: Families, name: str) -> None:
    merged = []
    for shards in (1, 2, 5):
        document = recipe_document(METHODS[name], families(FamilyKind(shards=shards)))
        with mergefs.open(write_document(tmp_path / f"{shards}.yml", document), max_shard_size="20KB") as model:
            merged.append(weights({file: model.read_file(file) for file in model.files.sizes}))
    assert merged[0] == merged[1] == merged[2]
    assert len(merged[0]) > 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_the_size_of_blocks_makes_no_difference(
    tmp_path: Path, families: Families, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    recipe = write_document(tmp_path / "recipe.yml", recipe_document(METHODS[name], families(FamilyKind(dtype))))
    merged = []
    for elements in (64, 999, blocks.BLOCK_ELEMENTS):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        with mergefs.open(recipe, catalog=tmp_path / f"catalog-{elements}") as model:
            merged.append({file: model.read_file(file) for file in model.files.sizes})
    assert merged[0] == merged[1] == merged[2]


@pytest.mark.parametrize("name", ["ties", "linear", "slerp"])
def test_blocks_threads_and_shards_make_no_difference_to_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nor does it matter whether the inputs were hashed alone, or analysed as a family."""
    found = []
    for number, (elements, threads, shards) in enumerate(
        [(blocks.CONTENT_ELEMENTS, 1, 1), (64, 5, 2), (999, 2, 5), (512, 3, 1)]
    ):
        place = tmp_path / str(number)
        models = family(place, experts=2, dtype=torch.bfloat16, tied=False, shards=shards)
        relative = Family(Path(models.base.name), tuple(Path(expert.name) for expert in models.experts))
        write_document(place / "recipe.yml", recipe_document(METHODS[name], relative))
        monkeypatch.chdir(place)
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        for command in [("analyze", "recipe.yml")] * (number % 2) + [("materialize", "recipe.yml", "out")]:
            said = said_by("--catalog", place / "catalog", *command)
            assert said.status == 0, said.stderr
        found.append(read_manifest(place / "out"))
    first, *others = found
    assert [one.content for one in others] == [first.content] * 3
    assert [one.manifest for one in others] == [first.manifest] * 3
    assert all(entry.identity for entry in first.contents.inputs)


# Cache, order, threads

Open = Callable[[int], ModelFiles]


@pytest.fixture
def open_with_cache(tmp_path: Path, families: Families, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Return a function that opens a merge of several blocks with a cache of so many bytes and a new catalog."""
    family = families(FamilyKind(torch.float32, tied=True, hidden=128, layers=1, vocabulary=10007))
    recipe = write_document(tmp_path / "recipe.yml", recipe_document(METHODS[request.param], family))
    opened: list[Workspace] = []

    def create(cache_size: int) -> ModelFiles:
        opened.append(Workspace.create(Catalog(tmp_path / f"catalog-{len(opened)}"), cache_size))
        plan = make_plan(load_recipe(recipe), PlanOptions(), opened[-1])
        return ModelFiles(plan, opened[-1], strict=False)

    yield create
    for resources in opened:
        resources.close()


PIECE = 300_001
"""Bytes of one read: neither a block nor a page, and no divisor of either."""


def read_in_pieces(files: ModelFiles, order: Callable[[list[int]], object], threads: int) -> bytes:
    """Return the weight file, put together from pieces that were read in some order."""
    size = files.sizes["model.safetensors"]
    offsets = list(range(0, size, PIECE))
    order(offsets)
    with ThreadPoolExecutor(threads) as pool:
        pieces = pool.map(lambda offset: files.read("model.safetensors", offset, PIECE), offsets)
        return b"".join(piece for _, piece in sorted(zip(offsets, pieces, strict=True)))


@pytest.mark.parametrize("open_with_cache", ["ties", "dare_ties", "slerp"], indirect=True)
def test_cache_order_and_threads_make_no_difference(open_with_cache: Open) -> None:
    files = open_with_cache(2**26)
    whole = files.read("model.safetensors", 0, files.sizes["model.safetensors"])
    assert files.plan.tensors["model.embed_tokens.weight"].grid.count > 2
    shuffle = random.Random(1).shuffle
    assert read_in_pieces(open_with_cache(0), shuffle, threads=1) == whole
    assert read_in_pieces(open_with_cache(2**21), list.reverse, threads=1) == whole
    assert read_in_pieces(open_with_cache(0), shuffle, threads=5) == whole
    assert read_in_pieces(open_with_cache(2**21), shuffle, threads=5) == whole
    assert read_in_pieces(open_with_cache(2**26), list.sort, threads=5) == whole


@pytest.mark.parametrize("open_with_cache", ["ties"], indirect=True)
def test_many_readers_of_one_cold_block_get_it_computed_once(open_with_cache: Open) -> None:
    files = open_with_cache(2**26)
    with ThreadPoolExecutor(8) as pool:
        pieces = set(pool.map(lambda _: files.read("model.safetensors", 8192, 4096), range(64)))
    assert len(pieces) == 1
    assert files.engine._resources.cache.totals().cache_misses == 1
    block = files.plan.tensors["model.embed_tokens.weight"].grid.step * 4
    assert files.engine._resources.ledger.totals().expert_bytes_read == 2 * block
