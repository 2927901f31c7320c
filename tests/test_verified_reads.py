"""Blocks whose hashes are known are checked as they are read: what is not what was analysed is never merged."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import Family, family, fine_tuned, llama_config, llama_tensors, write_model
from damage import flip_bit
from lora import llama, train
from mounting import mounted_recipes
from recipes import MERGES, write_document, write_recipe

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.catalog.records import ContentRecord
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.cli import main
from mergefs.engine.workspace import Workspace
from mergefs.errors import SourceChangedError
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import StoredTensor
from mergefs.statistics.gathering import hash_tensor
from mergefs.statistics.identity import local_key

WEIGHTS = "model.safetensors"
FLIPS = 1000


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    """A recipe whose models have been analysed."""
    path = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    assert main(["analyze", str(path)]) == 0
    return path


@contextmanager
def workspace(verify_reads: bool = True) -> Iterator[Workspace]:
    opened = Workspace.create(Catalog(Path(os.environ["MERGEFS_CATALOG"])), verify_reads=verify_reads)
    try:
        yield opened
    finally:
        opened.close()


def bit_of(expert: Path, tensor: str, element: int = 0) -> int:
    """Return the position of the lowest bit of an element (16 bits) in the file of a model of one shard."""
    return (open_checkpoint(expert).tensors[tensor].offset + 2 * element) * 8


# Blocks ---------------------------------------------------------------------------------------------------------------


def test_every_single_flipped_bit_is_found_when_its_block_is_read(tmp_path: Path) -> None:
    """The tensors have one block, several, a short last one, or none."""
    config = llama_config(torch.bfloat16)
    tensors = fine_tuned(llama_tensors(0, torch.bfloat16), torch.bfloat16, seed=1, frozen=())
    tensors["several.weight"] = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(2)).bfloat16()
    tensors["none.weight"] = torch.empty(0, 32, dtype=torch.bfloat16)
    path = write_model(tmp_path / "expert", tensors, config) / WEIGHTS
    checkpoint = open_checkpoint(path.parent)
    places = [StoredTensor.of(checkpoint, name) for name in checkpoint.tensors]
    with workspace() as resources:
        for place in places:
            hash_tensor(place, resources.catalog, resources.reader)
        resources.catalog.flush()
        places[0].read(resources.reader, 0, 1, Purpose.EXPERT)  # opens the file, as it was analysed
        chance = random.Random(5)
        for _ in range(FLIPS):
            place = chance.choice([place for place in places if place.elements])
            grid = BlockGrid.of(place.shape)
            block = chance.randrange(grid.count)
            start, stop = grid.bounds(block)
            bit = (place.tensor.offset + 2 * start) * 8 + chance.randrange((stop - start) * 16)
            flip_bit(path, bit)
            with pytest.raises(SourceChangedError, match=f"block {block} of tensor '{place.tensor.name}' .* restore"):
                place.read(resources.reader, start, stop, Purpose.EXPERT)
            flip_bit(path, bit)
            assert place.read(resources.reader, start, stop, Purpose.EXPERT).size == (stop - start) * 2
        for place in places:
            assert place.read(resources.reader, 0, place.elements, Purpose.EXPERT).size == place.nbytes


def test_blocks_are_checked_in_longer_runs_and_pieces_of_blocks_are_not(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(2048, 1024, dtype=torch.bfloat16)}
    path = write_model(tmp_path / "model", tensors, llama_config(torch.bfloat16)) / WEIGHTS
    place = StoredTensor.of(open_checkpoint(path.parent), "weight")
    step = BlockGrid.of(place.shape).step
    with workspace() as resources:
        hash_tensor(place, resources.catalog, resources.reader)
        resources.catalog.flush()
        place.read(resources.reader, 0, 1, Purpose.BASE)  # opens the file, as it was analysed
        flip_bit(path, (place.tensor.offset + 2 * step) * 8)  # the first element of block 1
        read = resources.reader
        with pytest.raises(SourceChangedError, match="block 1 of tensor 'weight'"):
            place.read(read, step // 2, 3 * step, Purpose.BASE)
        with pytest.raises(SourceChangedError, match="block 1 of tensor 'weight'"):
            place.read_kept(read, Purpose.BASE)
        assert place.read(read, step, 2 * step - 1, Purpose.BASE).any()
        assert not place.read(read, 0, step, Purpose.BASE).any()


def test_hashes_that_do_not_fit_the_tensor_are_none(models: Family) -> None:
    place = StoredTensor.of(open_checkpoint(models.base), "lm_head.weight")
    with workspace() as resources:
        resources.catalog.keep_content(local_key(place), ContentRecord(b"d" * 24, b"x" * 31))
        resources.catalog.flush()
        assert place.read(resources.reader, 0, place.elements, Purpose.EXPERT).size == place.nbytes


def test_what_is_written_to_while_a_file_is_open_is_noticed_without_any_hash(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe) as model:
        model.get_tensor("lm_head.weight")  # opens every file
        with (models.experts[0] / WEIGHTS).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\0\0")
        with pytest.raises(SourceChangedError, match=f"{models.experts[0] / WEIGHTS}: was written to since"):
            model.get_tensor("model.norm.weight")


def test_permissions_and_links_of_an_open_file_may_change(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe) as model:
        model.get_tensor("lm_head.weight")
        (models.experts[0] / WEIGHTS).chmod(0o400)
        (tmp_path / "link").hardlink_to(models.experts[0] / WEIGHTS)
        assert model.get_tensor("model.norm.weight").numel()


# Whole merges ---------------------------------------------------------------------------------------------------------


def test_a_file_that_was_swapped_keeping_size_and_time_is_never_mixed_in(recipe: Path, models: Family) -> None:
    """It is another inode, or its inode has changed: that is seen when it is opened."""
    path = models.experts[0] / WEIGHTS
    status = path.stat()
    with open_model(recipe) as model:
        other = path.with_name("other")
        other.write_bytes((models.experts[1] / WEIGHTS).read_bytes())
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)
        with pytest.raises(SourceChangedError, match=f"{path}: changed since the plan was made"):
            model.get_tensor("lm_head.weight")


def test_a_bit_that_flips_in_an_open_file_is_found_by_its_hash(recipe: Path, models: Family) -> None:
    path = models.experts[1] / WEIGHTS
    bit = bit_of(models.experts[1], "model.embed_tokens.weight", 7)
    with open_model(recipe) as model:
        model.get_tensor("lm_head.weight")
        flip_bit(path, bit)
        with pytest.raises(SourceChangedError, match=r"block 0 of tensor 'model.embed_tokens.weight'") as caught:
            model.get_tensor("model.embed_tokens.weight")
        assert caught.value.errno == errno.ESTALE
        assert model.get_tensor("model.layers.0.mlp.up_proj.weight").numel()
        flip_bit(path, bit)
        assert model.get_tensor("model.embed_tokens.weight").numel()


def test_what_was_not_analysed_has_no_hash_to_be_held_against(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe) as model:
        model.get_tensor("lm_head.weight")
        flip_bit(models.experts[1] / WEIGHTS, bit_of(models.experts[1], "model.embed_tokens.weight"))
        assert model.get_tensor("model.embed_tokens.weight").numel()


def test_checking_can_be_turned_off(recipe: Path, models: Family) -> None:
    flipped = bit_of(models.experts[1], "model.embed_tokens.weight")
    with open_model(recipe, verify_reads=False) as model:
        model.get_tensor("lm_head.weight")
        flip_bit(models.experts[1] / WEIGHTS, flipped)
        assert model.get_tensor("model.embed_tokens.weight").numel()


def test_a_damaged_adapter_is_noticed(tmp_path: Path) -> None:
    base = llama()(tmp_path / "base", torch.bfloat16)
    train(base, tmp_path / "adapter", seed=1, r=4, target_modules=["q_proj", "v_proj"])
    recipe = write_document(
        tmp_path / "recipe.yml",
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": f"{base}+{tmp_path / 'adapter'}", "parameters": {"weight": 0.5}}],
        },
    )
    assert main(["analyze", str(recipe)]) == 0
    factors = tmp_path / "adapter" / "adapter_model.safetensors"
    with open_model(recipe) as model:
        model.get_tensor("model.layers.0.self_attn.v_proj.weight")
        flip_bit(factors, (factors.stat().st_size - 1) * 8)
        flip_bit(factors, (factors.stat().st_size // 2) * 8)
        with pytest.raises(SourceChangedError, match=f"{factors}: block 0 of tensor"):
            model.get_tensor("model.layers.0.self_attn.q_proj.weight")


def test_a_mount_answers_estale_for_a_damaged_block_and_serves_the_others(tmp_path: Path) -> None:
    models = family(
        tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1, hidden=256, vocabulary=8192
    )
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    assert main(["analyze", str(recipe)]) == 0
    allowed = [r"block 0 of tensor 'model.norm.weight' .* is not what was analysed"]
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", allowed=allowed) as mount:
        merged = tmp_path / "mnt" / WEIGHTS
        size = merged.stat().st_size
        descriptor = os.open(merged, os.O_RDONLY)
        try:
            first = os.pread(descriptor, 4096, 16384)  # of the first tensor, so that every source is open
            flip_bit(models.base / WEIGHTS, bit_of(models.base, "model.norm.weight"))  # that of experts is not read
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    os.pread(descriptor, 100, size - 100)
                assert caught.value.errno == errno.ESTALE
            assert os.pread(descriptor, 4096, 16384) == first
            assert os.pread(descriptor, 100, size - 2**21)
        finally:
            os.close(descriptor)
        assert "'model.norm.weight'" in mount.log()


def test_a_mount_can_do_without_checking(recipe: Path, models: Family, tmp_path: Path) -> None:
    with mounted_recipes(
        recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", options=["--no-verify-reads"]
    ) as mount:
        assert len((mount.mountpoint / WEIGHTS).read_bytes()) == (mount.mountpoint / WEIGHTS).stat().st_size
