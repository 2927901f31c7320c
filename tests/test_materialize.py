"""``materialize``: at every instant the destination is what it was, or the complete new model."""

import fcntl
import gc
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from checkpoints import Family, family
from mounting import environment
from recipes import MERGES, write_recipe
from weight_pieces import piece_hashes

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.cli import main
from mergefs.engine.workspace import Workspace
from mergefs.errors import MaterializeError
from mergefs.materialize import materialize as materialize_module
from mergefs.materialize import run as run_module
from mergefs.materialize import weights
from mergefs.materialize.manifest import MANIFEST_NAME
from mergefs.materialize.materialize import Interrupted, Materialized, Order, materialize
from mergefs.materialize.output import Buffers
from mergefs.materialize.recomputing import verify_deep
from mergefs.materialize.staging import locked, staging_path
from mergefs.materialize.verify import verify
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)


def write(
    recipe: Path,
    destination: Path,
    overwrite: bool = False,
    budget: str | None = None,
    interrupted: Interrupted = Interrupted.REFUSE,
) -> Materialized:
    resources = Workspace.create(Catalog(Path(os.environ["MERGEFS_CATALOG"])))
    try:
        plan = make_plan(load_recipe(recipe), PlanOptions(budget), resources)
        return materialize(plan, destination, resources, overwrite, interrupted=interrupted)
    finally:
        resources.close()


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def merged_files(recipe: Path) -> dict[str, bytes]:
    """Return what the model's directory is to hold, without the manifest."""
    with open_model(recipe) as model:
        return {name: model.read_file(name) for name in model.files.sizes}


def states() -> list[str]:
    with Catalog(Path(os.environ["MERGEFS_CATALOG"])) as catalog:
        return sorted(record.state for record in catalog.transactions())


def hash_of(name: str, content: bytes) -> str:
    """Return the hash of a file in a manifest: of one that has weights, that of the hashes of its pieces."""
    if name.endswith(".safetensors"):
        content = b"".join(map(bytes.fromhex, piece_hashes(content)))
    return str(blake3(content).hexdigest())


# What is written ------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_merged_model_and_a_manifest_of_their_hashes(recipe: Path, tmp_path: Path) -> None:
    expected = merged_files(recipe)
    result = write(recipe, tmp_path / "out")
    written = content_of(tmp_path / "out")
    manifest = json.loads(written.pop(MANIFEST_NAME))
    assert written == expected
    assert {name: (entry["size"], entry["blake3"]) for name, entry in manifest["files"].items()} == {
        name: (len(content), hash_of(name, content)) for name, content in sorted(expected.items())
    }
    assert result.plan_id.startswith(f"local-{manifest['plan_id']}")
    assert manifest["manifest"] == result.manifest
    assert (
        manifest["cost"]["expert_bytes_read"]
        == manifest["cost"]["expert_bytes_planned"]
        == result.totals.expert_bytes_read
    )
    assert result.files == len(written) + 1
    assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert states() == ["committed"]


def test_two_runs_write_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(recipe, tmp_path / name, budget="50%")
    assert content_of(tmp_path / "first") == content_of(tmp_path / "second")


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(
    recipe: Path, tmp_path: Path, mask: int, file_mode: int, directory_mode: int
) -> None:
    before = os.umask(mask)
    try:
        write(recipe, tmp_path / "new" / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "new" / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == file_mode, path
    assert stat.S_IMODE((tmp_path / "new" / "out").stat().st_mode) == directory_mode


def test_an_empty_directory_becomes_the_model_and_nothing_is_left_beside_it(recipe: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "out").mkdir(parents=True)
    write(recipe, parent / "out")
    assert list(parent.iterdir()) == [parent / "out"]
    assert verify(parent / "out").files == len(merged_files(recipe))


def test_what_was_written_verifies_against_its_sources(recipe: Path, tmp_path: Path) -> None:
    write(recipe, tmp_path / "out", budget="40%")
    resources = Workspace.create(Catalog(tmp_path / "another catalog"))
    assert verify_deep(tmp_path / "out", resources).recomputed_bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    resources.close()


# Replacing ------------------------------------------------------------------------------------------------------------


def test_overwriting_replaces_the_whole_directory(recipe: Path, tmp_path: Path) -> None:
    write(recipe, tmp_path / "out", budget="0")
    (tmp_path / "out" / "left over.txt").write_text("old")
    write(recipe, tmp_path / "out", overwrite=True)
    written = content_of(tmp_path / "out")
    del written[MANIFEST_NAME]
    assert written == merged_files(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out", "recipe.yml"]


def test_who_reads_while_a_model_is_replaced_sees_the_old_or_the_new_one_and_never_none(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(recipe, out, budget="0")
    for budget in ("0", "100%"):
        write(recipe, tmp_path / f"copy {budget}", budget=budget)
    ids = {
        json.loads((tmp_path / f"copy {budget}" / "mergefs.json").read_bytes())["plan_id"] for budget in ("0", "100%")
    }
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(json.loads((out / "mergefs.json").read_bytes())["plan_id"])

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for budget in ("100%", "0", "100%"):
            write(recipe, out, overwrite=True, budget=budget)
        done.set()
        reader.result(60)
    assert len(ids) == 2
    assert seen <= ids


# Interruptions --------------------------------------------------------------------------------------------------------

_DIE = """
import os, signal, sys
from mergefs.materialize import output, staging
point, count = sys.argv[1], int(sys.argv[2])

def die(*_, **__):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def before(module, name):
    real = getattr(module, name)
    def wrapped(*arguments, **keywords):
        die()
        return real(*arguments, **keywords)
    setattr(module, name, wrapped)

def after(module, name):
    real = getattr(module, name)
    def wrapped(*arguments, **keywords):
        result = real(*arguments, **keywords)
        die()
        return result
    setattr(module, name, wrapped)

{
    "before writing": lambda: before(output, "write_all"),
    "after writing": lambda: after(output, "write_all"),
    "before the commit": lambda: before(staging.Staging, "commit"),
    "after the exchange": lambda: after(staging, "exchange"),
    "after the commit": lambda: after(staging.Staging, "commit"),
}[point]()
from mergefs.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("point", "count", "complete", "transactions"),
    [
        ("before writing", 0, False, ["aborted", "committed"]),
        ("after writing", 3, False, ["aborted", "committed"]),
        ("before the commit", 0, False, ["committed"]),  # which is gone on with
        ("after the commit", 0, True, ["committed", "committed"]),
    ],
)
@pytest.mark.parametrize("replacing", [False, True])
def test_a_run_that_is_killed_leaves_the_old_state_or_the_new_one_and_the_next_run_cleans_up(
    recipe: Path, tmp_path: Path, point: str, count: int, complete: bool, transactions: list[str], replacing: bool
) -> None:
    out = tmp_path / "parent" / "out"
    if replacing:
        write(recipe, out, budget="0")
    old = content_of(out) if replacing else None
    if replacing and complete:
        point = "after the exchange"
    process = subprocess.run(
        [sys.executable, "-c", _DIE, point, str(count), "materialize", "--overwrite", str(recipe), str(out)],
        env=environment(tmp_path / "state"),
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    expected = merged_files(recipe)
    if complete:
        assert verify(out)
        assert expected.items() <= content_of(out).items()
    elif replacing:
        assert content_of(out) == old
    else:
        assert not out.exists()

    write(recipe, out, overwrite=True, interrupted=Interrupted.RESUME)
    assert list(out.parent.iterdir()) == [out]
    assert expected.items() <= content_of(out).items()
    assert states() == [*transactions, *["committed"] * replacing]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "check_space", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(MaterializeError, match=r"writing failed after \d+ bytes \(No space left on device\); free"):
            write(recipe, disk / "deep" / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert states() == ["aborted"]


def test_what_was_planned_is_not_looked_through_for_garbage_while_it_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_together, looked_through = materialize_module.materialize_together, []

    def watch(orders: Sequence[Order], *arguments: Any) -> list[Materialized | Exception]:
        objects = {id(one) for generation in range(3) for one in gc.get_objects(generation)}
        looked_through.extend(id(one) in objects for order in orders for one in order.plan.tensors.values())
        return write_together(orders, *arguments)

    monkeypatch.setattr(materialize_module, "materialize_together", watch)
    try:
        assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 0
    finally:
        gc.unfreeze()
    assert gc.isenabled()
    assert looked_through
    assert not any(looked_through)


def test_chunks_lie_in_large_pages_where_the_kernel_has_them() -> None:
    buffers = Buffers(3, 2**23)
    taken = [np.frombuffer(buffers.take(), dtype=np.uint8) for _ in range(3)]
    starts = {int(one.ctypes.data) for one in taken}
    assert all(start % 4096 == 0 for start in starts)
    asked_for, inside = set(), set()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(number, 16) for number in found.groups())
            inside = {start for start in starts if first <= start < last}
        elif line.startswith("VmFlags:") and "hg" in line.split():
            asked_for |= inside
    assert asked_for == (starts if Path("/sys/kernel/mm/transparent_hugepage").exists() else set())


def test_a_chunk_is_begun_when_what_it_is_made_from_has_been_read(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else threads would read the disk in disorder."""
    monkeypatch.setattr(weights, "CHUNK", 4096)
    announce, make = weights.WeightFile.announce, weights.WeightFile.make
    announced: set[int] = set()
    begun: defaultdict[int, threading.Event] = defaultdict(threading.Event)
    early: list[int] = []

    def slow_announce(file: weights.WeightFile, offset: int) -> None:
        announce(file, offset)
        if offset:  # meanwhile all other threads could begin with this one
            assert begun[offset - weights.CHUNK].wait(60)
        announced.add(offset)

    def watched_make(file: weights.WeightFile, offset: int) -> weights.Chunk:
        early.extend({offset} - announced)
        begun[offset].set()
        return make(file, offset)

    monkeypatch.setattr(weights.WeightFile, "announce", slow_announce)
    monkeypatch.setattr(weights.WeightFile, "make", watched_make)
    write(recipe, tmp_path / "out")
    assert len(announced) > 8
    assert early == []


def test_ctrl_c_leaves_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(materialize_module, "write_models", interrupt)
    before = sorted(tmp_path.iterdir())
    assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.iterdir()) == before
    assert states() == ["aborted"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_to_end_leaves_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    monkeypatch.setattr(materialize_module, "write_models", lambda *_: os.kill(os.getpid(), number))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["materialize", str(recipe), str(tmp_path / "out")])
    assert ended.value.code == 128 + number
    assert sorted(tmp_path.iterdir()) == before
    assert states() == ["aborted"]
    assert signal.getsignal(number) is handler


# Two at once ----------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_by_the_name_of_the_first_and_does_it_no_harm(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with locked(out) as stage:
        stage.create()
        (stage.model / "work").write_text("hours of it")
        result = subprocess.run(
            [sys.executable, "-m", "mergefs.cli", "materialize", str(recipe), str(out)],
            env=environment(tmp_path / "state"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert f"{out}: process {os.getpid()} is writing this model already; wait for it" in result.stderr
        assert (stage.model / "work").read_text() == "hours of it"
        stage.commit()
        stage.remove()
    assert content_of(out) == {"work": b"hours of it"}
    assert not staging_path(out).exists()


def test_a_lock_that_a_dead_process_left_is_no_obstacle(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.mergefs-lock").write_text("4194304")
    staging_path(tmp_path / "out").mkdir()
    (staging_path(tmp_path / "out") / "model.safetensors").write_text("half")
    write(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out", "recipe.yml"]


def test_a_lock_that_was_removed_before_it_was_had_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes it as its last act, perhaps between another's opening and locking it."""
    real = fcntl.flock
    removed: list[Path] = []

    def lock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(tmp_path / ".out.mergefs-lock")
            removed[0].unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with (
        locked(tmp_path / "out"),
        pytest.raises(MaterializeError, match=f"process {os.getpid()}"),
        locked(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
