"""Sequential readers of a mount are recognised, and what they read next is computed before they ask for it."""

import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from checkpoints import Family, write_model
from mounting import Mount, mounted_recipes, wait_for
from queued_reading import Queued
from recipes import MERGES, write_recipe
from safetensors.torch import load_file

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.engine.file_blocks import FileBlocks
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import last_reading
from mergefs.engine.resources import Resources
from mergefs.engine.workspace import Workspace
from mergefs.mount.handles import Handles
from mergefs.mount.kernel_window import KERNEL_WINDOW, widen
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.reading_ahead import (
    RECOGNISED_AFTER,
    SHARE_OF_CACHE,
)
from mergefs.mount.shown import ModelDirectory
from mergefs.mount.unmount import read_status
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan_ids import PLAN_ID_ATTRIBUTE
from mergefs.recipe.model import load_recipe

KIB: Final = 2**10
MIB: Final = 2**20
WEIGHTS: Final = "model.safetensors"

# With models ----------------------------------------------------------------------------------------------------------


ROWS: Final = 12 * 1024
NAMES: Final = ("model.layers.0.weight", "model.layers.1.weight", "model.layers.2.weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two experts with three tensors of 12 MiB each, and one that every model has alike.

    It is so small that the merged file is not laid out for the sake of what is copied.
    """
    directory = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(ROWS, 512, generator=generator).bfloat16() for name in NAMES}
    base["positions"] = (torch.arange(2432 * KIB) % 251).to(torch.uint8).reshape(-1, 512)

    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        noise = torch.randn(ROWS, 512, generator=generator) * 0.01
        return {name: one + noise.to(one.dtype) if one.is_floating_point() else one for name, one in tensors.items()}

    paths = [
        write_model(directory / name, tensors, {"model_type": "llama", "num_hidden_layers": 3}, tokenizer_files=False)
        for name, tensors in (("base", base), ("one", changed(base)), ("two", changed(base)))
    ]
    return Family(paths[0], tuple(paths[1:]))


@contextmanager
def opened(models: Family, directory: Path, merge: str, budget: str | None = None) -> Iterator["Reader"]:
    """Open the weights of a merge as a mount does."""
    recipe = load_recipe(write_recipe(directory / "recipe.yml", MERGES[merge], models))
    resources = Workspace.create(Catalog(directory / "catalog"))
    files = ModelFiles(make_plan(recipe, PlanOptions(budget), resources), resources, strict=False)
    ahead = Queued()
    handles = Handles(ahead)
    reader = Reader(files, resources, ahead, handles, handles.open(ModelDirectory(files), WEIGHTS))
    try:
        yield reader
        handles.release(reader.handle)
    finally:
        ahead.close()
        resources.close()


@dataclass(frozen=True)
class Reader:
    """An open file of weights, ahead of whose reader blocks are computed when the test says so."""

    files: ModelFiles
    resources: Resources
    ahead: Queued
    handles: Handles
    handle: int

    def read(self, begin: int, end: int, size: int = 128 * KIB) -> bytes:
        """Read a range in order, with all that is due computed ahead after each request."""
        pieces = []
        for offset in range(begin, end, size):
            pieces.append(self.handles.read(self.handle, offset, min(size, end - offset)))
            self.ahead.work()
        return b"".join(pieces)

    def place(self, name: str) -> tuple[int, int]:
        """Return where a tensor begins and ends in the file."""
        file = next(file for file in self.files.plan.files if file.name == WEIGHTS)
        begin = file.offsets[list(file.tensors).index(name)]
        return begin, begin + self.files.plan.tensors[name].nbytes


@pytest.mark.parametrize("budget", [None, "40%"])
def test_reading_ahead_changes_no_byte_and_reads_none_twice(models: Family, tmp_path: Path, budget: str | None) -> None:
    with opened(models, tmp_path, "ties", budget) as reader:
        found = reader.read(0, reader.files.sizes[WEIGHTS])
        outcome = reader.files.plan.outcome
        read = reader.resources.ledger.totals()
        cached = reader.resources.cache.totals()
        tallied = reader.files.engine.tally.total()
    with open_model(tmp_path / "recipe.yml", budget=budget) as model:
        assert model.read_file(WEIGHTS) == found
    assert read.expert_bytes_read == tallied == outcome.expert_bytes_planned
    assert read.base_bytes_read == outcome.base_bytes
    assert read.expert_bytes_reread == 0
    assert read.bytes_served == len(found)
    if budget is None:
        assert cached.cache_misses < len(found) // MIB // 2  # the others were there before they were asked for


def test_copies_of_a_source_are_left_to_their_reader(models: Family, tmp_path: Path) -> None:
    with opened(models, tmp_path, "task_arithmetic") as reader:
        begin, end = reader.place("positions")
        reader.read(begin, end)
        totals = reader.resources.cache.totals()
        assert end - begin > RECOGNISED_AFTER
        assert totals.cache_misses == reader.files.plan.tensors["positions"].grid.count


def test_blocks_that_are_not_bought_take_no_kernel_and_are_left_to_their_reader(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(models, tmp_path, "task_arithmetic", "0%") as reader:
        monkeypatch.setattr("mergefs.engine.merging.run_kernel", lambda *_: pytest.fail("a kernel runs for a copy"))
        found = reader.read(0, reader.files.sizes[WEIGHTS])
        for name, tensor in load_file(models.base / WEIGHTS).items():
            begin, end = reader.place(name)
            assert found[begin:end] == tensor.view(torch.uint8).numpy().tobytes()
        tensors = reader.files.plan.tensors.values()
        assert reader.resources.cache.totals().cache_misses == sum(tensor.grid.count for tensor in tensors)


def test_a_loader_that_wants_one_tensor_has_nothing_of_the_others_read(models: Family, tmp_path: Path) -> None:
    """Behind it the kernel reads a little of the next by itself, which must not look like going on."""
    with opened(models, tmp_path, "task_arithmetic") as reader:
        begin, end = reader.place(NAMES[0])
        reader.read(begin, end)
        assert reader.resources.ledger.totals().expert_bytes_read == 2 * (end - begin)
        reader.read(end, end + KERNEL_WINDOW)
        assert reader.resources.ledger.totals().expert_bytes_read == 2 * (end - begin + KERNEL_WINDOW)


def test_who_goes_on_into_the_next_tensor_runs_through_the_file(models: Family, tmp_path: Path) -> None:
    with opened(models, tmp_path, "task_arithmetic") as reader:
        begin, end = reader.place(NAMES[0])
        blocks = FileBlocks(reader.files.engine, WEIGHTS, reader.files.sizes[WEIGHTS])
        assert blocks.reach(0, end) == blocks.reach(begin, end) == blocks.reach(begin, end + MIB) == end
        assert blocks.reach(begin, end + 2 * MIB) == blocks.size


def test_the_blocks_of_a_file_are_those_that_it_is_computed_by(models: Family, tmp_path: Path) -> None:
    with opened(models, tmp_path, "task_arithmetic") as reader:
        blocks = FileBlocks(reader.files.engine, WEIGHTS, reader.files.sizes[WEIGHTS])
        ends, position = [], 0
        while position < blocks.size:
            assert blocks.end_of(position) > position
            position = blocks.end_of(position)
            ends.append(position)
        file = next(file for file in reader.files.plan.files if file.name == WEIGHTS)
        expected = [len(file.header)]
        for name, begin in zip(file.tensors, file.offsets, strict=True):
            tensor = reader.files.plan.tensors[name]
            bounds = [tensor.grid.bounds(block) for block in range(tensor.grid.count)]
            expected += [begin + stop * tensor.dtype.itemsize for _, stop in bounds]
        assert ends == expected


# With mounts ----------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(models: Family, directory: Path, options: Sequence[str] = ()) -> Iterator[Mount]:
    recipe = write_recipe(directory / "recipe.yml", MERGES["task_arithmetic"], models)
    with mounted_recipes(recipe, mountpoint=directory / "mnt", state=directory / "state", options=options) as mount:
        yield mount


def status(mount: Mount, key: str) -> int:
    """Return a count of bytes or look-ups of a mount."""
    entry = find_mount(mount.mountpoint)
    assert entry is not None
    found = read_status(entry)[key]
    assert isinstance(found, int)
    return found


def read_by_calls(path: Path) -> bytes:
    return path.read_bytes()


def read_by_mapping(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        return b"".join(pages[begin : begin + mmap.PAGESIZE] for begin in range(0, len(pages), mmap.PAGESIZE))


@pytest.mark.mounts
@pytest.mark.parametrize("read", [read_by_calls, read_by_mapping])
def test_who_reads_a_mounted_file_in_order_finds_most_of_it_computed(
    models: Family, tmp_path: Path, read: Callable[[Path], bytes]
) -> None:
    with mounted(models, tmp_path) as mount:
        found = read(mount.mountpoint / WEIGHTS)
        served, misses, reread = (status(mount, key) for key in ("bytes_served", "cache_misses", "expert_bytes_reread"))
        expert_bytes, planned = status(mount, "expert_bytes_read"), status(mount, "expert_bytes_planned")
    with open_model(tmp_path / "recipe.yml") as model:
        assert model.read_file(WEIGHTS) == found
        blocks = sum(tensor.grid.count for tensor in model.plan.tensors.values())
    assert (expert_bytes, reread) == (planned, 0)
    assert served >= len(found)
    assert misses < blocks


@pytest.mark.mounts
def test_who_reads_a_mounted_file_at_random_has_no_more_computed_than_that(models: Family, tmp_path: Path) -> None:
    with mounted(models, tmp_path) as mount:
        path = mount.mountpoint / WEIGHTS
        places = list(range(3 * MIB // 2, path.stat().st_size, 3 * MIB))
        random.Random(1).shuffle(places)
        descriptor = os.open(path, os.O_RDONLY)
        for place in places:
            os.pread(descriptor, 4 * KIB, place)
        misses, plan_id = status(mount, "cache_misses"), plan_of(path)
        os.close(descriptor)
    assert misses <= len(places)
    assert read_in_all(plan_id) <= 2 * MIB * misses


@pytest.mark.mounts
def test_who_stops_reading_leaves_a_window_and_the_mount_ends_while_it_is_computed(
    models: Family, tmp_path: Path
) -> None:
    with mounted(models, tmp_path, ["--cache-size", "64MiB"]) as mount:
        plan_id = plan_of(mount.mountpoint / WEIGHTS)
        descriptor = os.open(mount.mountpoint / WEIGHTS, os.O_RDONLY)
        amount = sum(len(os.pread(descriptor, MIB, offset)) for offset in range(0, 8 * MIB, MIB))
        wait_for(lambda: status(mount, "expert_bytes_read") > 2 * amount, "blocks that nobody has asked for yet")
        os.close(descriptor)
    most = amount + 2 * KERNEL_WINDOW + 64 * MIB // SHARE_OF_CACHE
    assert 2 * amount < read_in_all(plan_id) <= 2 * most


def plan_of(path: Path) -> str:
    """Return the plan that a mounted file belongs to."""
    return os.getxattr(path, PLAN_ID_ATTRIBUTE).decode()


def read_in_all(plan_id: str) -> int:
    """Return the bytes of experts that a mount which has ended had read."""
    catalog = Catalog(Path(os.environ["MERGEFS_CATALOG"]))
    try:
        reading = last_reading(plan_id, catalog)
    finally:
        catalog.close()
    assert reading is not None
    return sum(sum(first) for first in reading.first().values()) + reading.again


# The kernel's own window ----------------------------------------------------------------------------------------------


@pytest.mark.mounts
def test_the_kernel_asks_a_mount_for_as_much_at_once_as_it_can_where_that_may_be_set(
    models: Family, tmp_path: Path
) -> None:
    with mounted(models, tmp_path) as mount:
        entry = find_mount(mount.mountpoint)
        assert entry is not None
        window = Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb")
        assert int(window.read_text()) == (KERNEL_WINDOW // KIB if os.access(window, os.W_OK) else 128)


@pytest.mark.parametrize(("before", "after"), [("128\n", "1024"), ("4096\n", "4096\n"), ("?\n", "?\n")])
def test_a_window_is_never_narrowed(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "0:60").mkdir()
    window = tmp_path / "0:60" / "read_ahead_kb"
    window.write_text(before)
    widen("0:60", tmp_path)
    assert window.read_text() == after


def test_where_the_kernel_does_not_let_its_window_be_set_nothing_is_done(tmp_path: Path) -> None:
    widen("0:60", tmp_path)
    assert list(tmp_path.iterdir()) == []
