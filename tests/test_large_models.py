"""What must not grow with the size of models: memory that a catalog's map keeps, time before a mount is ready."""

import gc
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import family
from recipes import MERGES, write_recipe

from mergefs.allocator import made_to_stay
from mergefs.catalog import Catalog
from mergefs.catalog.residency import Residency
from mergefs.checkpoint.dtypes import BF16
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan
from mergefs.planner.everything import select_everything
from mergefs.planner.plan import TensorPlan
from mergefs.planner.stock import all_blocks_differ, deltas_of, stock_of
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe

MIB = 2**20


def resident_file_pages() -> int:
    """Return how many bytes of mapped files are in this process's resident set."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0]) * 1024


def test_pages_of_the_catalogs_map_that_were_read_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(bytes(64 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = resident_file_pages()
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        assert resident_file_pages() - before > 60 * MIB
        residency = Residency(path)
        residency.note(MIB)
        assert resident_file_pages() - before > 60 * MIB, "not yet due"
        residency.note(64 * MIB)
        assert resident_file_pages() - before < 4 * MIB
        assert mapped[5 * MIB] == 0, "what is needed again comes back"


def test_a_private_map_of_the_same_file_keeps_what_was_written_into_it(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 7
        Residency(path).note(64 * MIB)
        assert mapped[0] == 7


def analysed_tensors(directory: Path, dtype: torch.dtype, merge: str) -> tuple[Workspace, tuple[TensorPlan, ...]]:
    made = family(directory / "models", experts=3, dtype=dtype, tied=False, shards=2)
    recipe = load_recipe(write_recipe(directory / "merge.yml", MERGES[merge], made))
    workspace = Workspace.create(Catalog(directory / "catalog"))
    analyze_draft(draft_plan(recipe, PlanOptions(), workspace), workspace, Silence())
    return workspace, draft_plan(recipe, PlanOptions(), workspace).tensors


@pytest.mark.parametrize("merge", ["ties", "linear without a base"])
def test_hashes_alone_tell_which_tensors_have_nothing_to_save(tmp_path: Path, merge: str) -> None:
    workspace, tensors = analysed_tensors(tmp_path, torch.bfloat16, merge)
    try:
        found = {}
        for tensor in tensors:
            stock = stock_of(tensor, deltas_of(tensor, workspace.catalog), workspace.catalog)
            found[tensor.name] = all_blocks_differ(tensor, workspace.catalog)
            assert found[tensor.name] == (not stock.saves), tensor.name
        assert set(found.values()) == {True, False}, "some tensors of the family are frozen, and others are not"
        selected = {tensor.name for tensor in select_everything(tensors, workspace.catalog) if tensor.selection}
        assert selected == {name for name, differs in found.items() if not differs}
    finally:
        workspace.close()


def test_hashes_do_not_tell_whether_values_differ_once_they_are_rounded(tmp_path: Path) -> None:
    workspace, tensors = analysed_tensors(tmp_path, torch.float32, "ties")
    try:
        differing = next(tensor for tensor in tensors if all_blocks_differ(tensor, workspace.catalog))
        rounded = replace(differing, compute=BF16)
        assert not all_blocks_differ(rounded, workspace.catalog)
    finally:
        workspace.close()


def test_nothing_is_told_of_what_has_not_been_hashed(tmp_path: Path) -> None:
    made = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = load_recipe(write_recipe(tmp_path / "merge.yml", MERGES["ties"], made))
    workspace = Workspace.create(Catalog(tmp_path / "catalog"))
    try:
        tensors = draft_plan(recipe, PlanOptions(), workspace).tensors
        assert not any(all_blocks_differ(tensor, workspace.catalog) for tensor in tensors)
    finally:
        workspace.close()


def test_what_a_server_keeps_is_never_looked_through_for_garbage() -> None:
    frozen = gc.get_freeze_count()
    try:
        with made_to_stay():
            assert not gc.isenabled()
            kept = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()
    with pytest.raises(KeyError), made_to_stay():
        raise KeyError
    assert gc.isenabled()
