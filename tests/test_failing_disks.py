"""Disks that are full or fail, and sources that do: a clear error, the old model as it was, nothing lost or left."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import Family, family
from faulty_files import FaultyFiles, faulty_files
from recipes import MERGES, write_recipe
from sentences import REMEDY
from weight_pieces import MIB
from workspaces import workspace

from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.engine.workspace import Workspace
from mergefs.errors import MaterializeError, SourceChangedError, SourceReadError
from mergefs.materialize import durability, output, weights, writer
from mergefs.materialize import materialize as run_materialize
from mergefs.materialize import run as run_module
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.materialize import Interrupted, Materialized, materialize
from mergefs.materialize.staging import staging_path
from mergefs.materialize.verify import verify
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe

WEIGHTS = "model.safetensors"
CHANGED = "model.layers.0.post_attention_layernorm.weight"
"""A tensor near the end of an expert's file that is not the base's."""
NEW, OLD = MERGES["task_arithmetic"], MERGES["linear without a base"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of six pieces."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1, hidden=256, layers=1, vocabulary=4500
    )


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", MIB)
    monkeypatch.setattr(durability, "SYNC_BYTES", MIB)


def plan_of(recipe: Path, resources: Workspace) -> MergePlan:
    return make_plan(load_recipe(recipe), PlanOptions(), resources, identified=True)


def write(
    recipe: Path, out: Path, overwrite: bool = False, interrupted: Interrupted = Interrupted.REFUSE
) -> Materialized:
    with workspace() as resources:
        return materialize(plan_of(recipe, resources), out, resources, overwrite, interrupted=interrupted)


@contextmanager
def disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


# Full disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_by_one", [False, True], ids=["side by side", "one by one"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_disk_that_is_full_at_any_stage_leaves_the_old_state_and_resuming_goes_on(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool, one_by_one: bool
) -> None:
    """Chunks that are written side by side share the last of the room, so that not all is used that could be."""
    if one_by_one:
        monkeypatch.setattr(writer, "_WAITING", 0)
        monkeypatch.setattr(run_materialize, "default_threads", lambda: 1)
    monkeypatch.setattr(run_module, "check_space", lambda *_: None)
    recipe = write_recipe(tmp_path / "recipe.yml", NEW, models)
    expected = write(recipe, tmp_path / "expected")
    old = write(write_recipe(tmp_path / "old.yml", OLD, models), tmp_path / "old")
    reused = []
    needed = expected.bytes_written + 16 * 4096
    for share in range(10):
        with disk(tmp_path / f"disk-{share}", (old.bytes_written + 2**20) * 2) as place:
            out = place / "out"
            if replacing:
                shutil.copytree(tmp_path / "old", out)
            taken = os.statvfs(place)
            used = (taken.f_blocks - taken.f_bfree) * taken.f_frsize
            room = max(used + needed * share // 10, 4096)
            subprocess.run(["mount", "-o", f"remount,size={room}", place], check=True)
            with pytest.raises(MaterializeError) as caught:
                write(recipe, out, overwrite=True)
            assert os.strerror(errno.ENOSPC) in str(caught.value)
            assert REMEDY.search(str(caught.value)), str(caught.value)
            assert manifest_hash(out) == (old.manifest if replacing else None)
            subprocess.run(["mount", "-o", f"remount,size={room + 2 * needed}", place], check=True)
            result = write(recipe, out, overwrite=True, interrupted=Interrupted.RESUME)
            assert result.manifest == expected.manifest == verify(out).manifest
            assert list(place.iterdir()) == [out]
            reused.append(result.reused_bytes)
    if one_by_one:
        assert reused == sorted(reused)
        # The last of five that fit may be on disk without the journal having had room to say so.
        assert reused[0] == 0
        assert 4 * MIB <= reused[-1] <= 5 * MIB
    else:
        assert reused[0] == 0
        assert 3 * MIB <= reused[-1] <= 5 * MIB


def test_work_that_would_not_fit_is_not_begun(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", NEW, models)
    with disk(tmp_path / "disk", 8 * 2**20) as place:
        with pytest.raises(MaterializeError, match=r"needs \d.* MiB and the disk has 8.00 MiB free; free some space"):
            write(recipe, place / "out")
        assert list(place.iterdir()) == []


# Disks that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_an_error_of_the_disk_at_any_step_leaves_the_old_state_and_resuming_goes_on(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", NEW, models)
    expected = write(recipe, tmp_path / "expected").manifest
    out = tmp_path / "place" / "out"
    failed, number = 0, 0
    while True:
        real = getattr(os, call)
        left = number

        def fail(*arguments: object, real: Callable[..., object] = real, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if call == "rename":
                patch.setattr(Path, "rename", fail)
            try:
                write(recipe, out, interrupted=Interrupted.RESUME)
            except MaterializeError as error:
                assert os.strerror(errno.EIO) in str(error)
                assert not out.exists() or manifest_hash(out) == expected
                failed += 1
        if left >= 0:
            break  # more than there are
        assert write(recipe, out, interrupted=Interrupted.RESUME).manifest == expected
        assert list(out.parent.iterdir()) == [out]
        shutil.rmtree(out)
        number += 1
    assert failed >= {"pwrite": 6, "fsync": 20, "rename": 1}[call]
    assert verify(out).manifest == expected


# Sources --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(models: Family, tmp_path: Path) -> Iterator[FaultyFiles]:
    with faulty_files(models.base.parent, tmp_path / "sources") as files:
        yield files


@pytest.fixture
def recipe(faulty: FaultyFiles, tmp_path: Path) -> Path:
    sources = Family(faulty.path / "base", (faulty.path / "expert-1", faulty.path / "expert-2"))
    return write_recipe(tmp_path / "recipe.yml", NEW, sources)


def of_tensor(models: Family, name: str) -> int:
    """Return where in the file of an expert a tensor begins."""
    return open_checkpoint(models.experts[0]).tensors[name].offset


def test_short_and_slow_reads_of_a_source_change_nothing(recipe: Path, faulty: FaultyFiles, tmp_path: Path) -> None:
    expected = write(recipe, tmp_path / "expected").manifest
    faulty.set(longest=50_000, delay=0.001)
    assert write(recipe, tmp_path / "out").manifest == expected


def test_a_source_that_cannot_be_read_is_named_and_the_rest_of_the_work_is_kept(
    recipe: Path, faulty: FaultyFiles, models: Family, tmp_path: Path
) -> None:
    expected = write(recipe, tmp_path / "expected")
    bad = of_tensor(models, CHANGED)
    faulty.set(fail_from=bad, fail_to=bad + 10)
    place = tmp_path / "place"
    with pytest.raises(
        SourceReadError, match=rf"{faulty.path / 'expert-1' / WEIGHTS}: reading .* failed: Input/output"
    ):
        write(recipe, place / "out")
    assert not (place / "out").exists()
    assert staging_path(place / "out").exists()
    faulty.set()
    result = write(recipe, place / "out", interrupted=Interrupted.RESUME)
    assert result.manifest == expected.manifest
    assert result.reused_bytes >= 3 * MIB
    assert list(place.iterdir()) == [place / "out"]


def test_a_flipped_bit_that_the_file_system_does_not_tell_of_is_found_by_its_hash(
    recipe: Path, faulty: FaultyFiles, models: Family, tmp_path: Path
) -> None:
    """Size, times, inode: all are the same. Only the hash of the analysis tells."""
    expected = write(recipe, tmp_path / "expected").manifest
    faulty.set(flip=8 * of_tensor(models, CHANGED) + 3)
    with pytest.raises(
        SourceChangedError,
        match=r"block 0 of tensor 'model.layers.0.post_attention_layernorm.weight' .* is not what was analysed",
    ):
        write(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    faulty.set()
    assert write(recipe, tmp_path / "out", interrupted=Interrupted.RESUME).manifest == expected


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5000)


def replace(path: Path) -> None:
    shutil.copy2(path.parent.parent / "expert-2" / WEIGHTS, path.with_name("new"))
    path.with_name("new").replace(path)


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))


@pytest.mark.parametrize("change", [delete, truncate, replace, write_over])
@pytest.mark.parametrize("known", [True, False])
def test_a_source_that_changes_during_the_work_is_named_and_nothing_of_it_is_written(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], known: bool
) -> None:
    """It is noticed as it is read or, where it had been read before, when all is written: also without any hash."""
    for directory in (models.base, *models.experts):
        shutil.copytree(directory, tmp_path / directory.name)
    mine = Family(tmp_path / "base", (tmp_path / "expert-1", tmp_path / "expert-2"))
    recipe = write_recipe(tmp_path / "recipe.yml", NEW, mine)
    source = mine.experts[0] / WEIGHTS
    out = tmp_path / "place" / "out"
    real, written = output.write_all, threading.Event()

    def write_and_change(descriptor: int, data: bytes, offset: int | None = None) -> None:
        real(descriptor, data, offset)
        if offset == 2 * MIB and not written.is_set():
            written.set()
            change(source)

    monkeypatch.setattr(output, "write_all", write_and_change)
    with workspace() as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(), resources, identified=known)
        with pytest.raises(SourceChangedError, match=str(source)) as caught:
            materialize(plan, out, resources)
    assert caught.value.errno == errno.ESTALE
    assert written.is_set()
    assert not out.exists()
    shutil.copy2(models.experts[0] / WEIGHTS, source)
    if known:  # it is the same plan again, and the work goes on
        assert write(recipe, out, interrupted=Interrupted.RESUME).reused_bytes > 0
    else:  # nobody knows that it is
        with pytest.raises(MaterializeError, match=r"an interrupted run of another plan, local-.*, has left"):
            write(recipe, out, interrupted=Interrupted.RESUME)
        assert write(recipe, out, interrupted=Interrupted.DISCARD).reused_bytes == 0
    assert list(out.parent.iterdir()) == [out]
