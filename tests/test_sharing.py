"""Copies share blocks on disk with their sources where a file system can do that, and are written where none can."""

import errno
import itertools
import json
import mmap
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from checkpoints import Family, family
from crashes import command_server
from hypothesis import given
from hypothesis import strategies as st
from recipes import MERGES, write_document, write_recipe
from sentences import said_by
from sharing_disks import SHARING, lose_power, sharing_disk
from weight_pieces import MIB
from workspaces import workspace

from mergefs.checkpoint.header import ShardHeader
from mergefs.checkpoint.source import Fingerprint, Shard
from mergefs.errors import SourceChangedError
from mergefs.materialize import durability, output, sharing, weights
from mergefs.materialize.journal import Part, read_journal
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.materialize import Interrupted, Materialized, materialize
from mergefs.materialize.output import Output
from mergefs.materialize.sharing import FileCopy, Sharing
from mergefs.materialize.staging import Staging, staging_path
from mergefs.materialize.verify import verify
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan import OutputFile
from mergefs.recipe.model import load_recipe

PAGE = 4096
NO_FILE = OutputFile("model.safetensors", b"", (), (), 0)


@dataclass(frozen=True, slots=True)
class Lender:
    """In the place of a reader of sources: there is one, and it is open."""

    descriptor: int

    @contextmanager
    def lend(self, source: Shard) -> Iterator[int]:
        yield self.descriptor


SIZE = 17 * 2**20
"""About the bytes of one model."""
SLACK = 2**20
"""What directories, headers and the edges of copies take."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that holds models, and the recipes and catalog of a test."""

    place: Path
    models: Family

    @property
    def used(self) -> int:
        os.sync()
        room = os.statvfs(self.place)
        return (room.f_blocks - room.f_bfree) * room.f_frsize


@contextmanager
def disk_with_models(directory: Path, kind: str) -> Iterator[Disk]:
    with sharing_disk(directory, kind) as place:
        models = family(
            place / "models",
            experts=2,
            dtype=torch.bfloat16,
            tied=False,
            shards=2,
            hidden=512,
            layers=2,
            vocabulary=4096,
        )
        os.sync()
        yield Disk(place, models)


@pytest.fixture(scope="module", params=SHARING)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with disk_with_models(tmp_path_factory.mktemp("disk"), request.param) as made:
        yield made


@pytest.fixture
def out(disk: Disk) -> Iterator[Path]:
    place = disk.place / "place"
    place.mkdir()
    yield place / "out"
    shutil.rmtree(place)


def passed_through(tmp_path: Path, models: Family) -> Path:
    document = {"merge_method": "passthrough", "models": [{"model": str(models.experts[0])}]}
    return write_document(tmp_path / "passthrough.yml", document)


def merged(tmp_path: Path, models: Family) -> Path:
    return write_recipe(tmp_path / "ties.yml", MERGES["ties"], models)


def write(
    recipe: Path, out: Path, budget: str | None = None, interrupted: Interrupted = Interrupted.REFUSE
) -> Materialized:
    with workspace() as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(budget=budget), resources, identified=True)
        return materialize(plan, out, resources, interrupted=interrupted)


def files_of(directory: Path) -> dict[str, bytes]:
    """Return what can be loaded of a model."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


# What is shared -------------------------------------------------------------------------------------------------------


def test_a_model_that_is_passed_through_takes_no_room(disk: Disk, out: Path, tmp_path: Path) -> None:
    recipe = passed_through(tmp_path, disk.models)
    before = disk.used
    result = write(recipe, out)
    assert result.shared_bytes > SIZE - SLACK
    assert disk.used - before < SLACK
    assert verify(out).manifest == result.manifest
    elsewhere = write(recipe, tmp_path / "elsewhere")  # another file system
    assert (elsewhere.shared_bytes, elsewhere.manifest) == (0, result.manifest)
    assert files_of(out) == files_of(tmp_path / "elsewhere")


@pytest.mark.parametrize("share", [0, 5, 20])
def test_what_a_budget_leaves_to_the_base_takes_no_room(disk: Disk, out: Path, tmp_path: Path, share: int) -> None:
    recipe = merged(tmp_path, disk.models)
    write(recipe, tmp_path / "elsewhere", f"{share}%")
    before = disk.used
    result = write(recipe, out, f"{share}%")
    written = result.bytes_written - result.shared_bytes
    assert result.shared_bytes > SLACK
    assert disk.used - before < written + SLACK
    assert written < SLACK + SIZE * share // 50  # of two experts
    assert result.manifest == manifest_hash(tmp_path / "elsewhere")
    assert files_of(out) == files_of(tmp_path / "elsewhere")


def test_a_whole_merge_shares_nothing(disk: Disk, out: Path, tmp_path: Path) -> None:
    assert write(merged(tmp_path, disk.models), out).shared_bytes == 0


def test_source_and_model_go_their_own_ways(disk: Disk, out: Path, tmp_path: Path) -> None:
    write(passed_through(tmp_path, disk.models), out)
    expected, sources = files_of(out), files_of(disk.models.experts[0])
    for path in out.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(MIB)
            file.write(bytes(MIB))
    assert files_of(disk.models.experts[0]) == sources
    write(passed_through(tmp_path, disk.models), out.with_name("again"))
    assert files_of(out.with_name("again")) == expected


def test_what_was_shared_is_told(disk: Disk, out: Path, tmp_path: Path) -> None:
    recipe = passed_through(tmp_path, disk.models)
    said = said_by("materialize", recipe, out)
    assert "with the sources, not written again" in said.stdout
    shown = json.loads(said_by("materialize", "--json", recipe, out.with_name("json")).stdout)
    assert SIZE - SLACK < shown["shared_bytes"] < shown["bytes_written"]
    assert "not written again" not in said_by("materialize", recipe, tmp_path / "elsewhere").stdout


# Where it cannot be done ----------------------------------------------------------------------------------------------


def test_a_file_system_that_cannot_share_is_asked_once_for_each_file(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = Output.share

    def counted(self: Output, *arguments: int) -> None:
        asked.append(self.path)
        real(self, *arguments)

    monkeypatch.setattr(Output, "share", counted)
    monkeypatch.setattr(weights, "CHUNK", MIB)
    with workspace() as resources:
        plan = make_plan(load_recipe(passed_through(tmp_path, disk.models)), PlanOptions(), resources, identified=True)
        result = materialize(plan, tmp_path / "out", resources, threads=1)
    assert result.shared_bytes == 0
    # Threads that wait for the disk may ask before the first of them has been told.
    assert {path.name for path in asked} == {file.name for file in plan.files}
    assert len(asked) <= 3 * len(plan.files) < SIZE // MIB
    assert files_of(tmp_path / "out").keys() == {file.name for file in plan.files}


RUNS = st.lists(
    st.tuples(st.integers(0, 300_000), st.integers(1, 400_000), st.integers(-3, 3), st.sampled_from([0, 8])), max_size=5
)
"""For each copy: bytes that are computed before it, its own, by how many pages it is shifted, and bytes beside."""


@given(runs=RUNS, cuts=st.lists(st.integers(1, 40), min_size=1), broken=st.integers(0, 9))
def test_whatever_is_shared_the_file_has_all_bytes(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int, int, int]], cuts: list[int], broken: int
) -> None:
    """Of any copies, in chunks of any number of pages, where one of the calls may fail. Here sharing is copying."""
    directory = tmp_path_factory.mktemp("any")
    content = bytearray()
    copied: list[FileCopy] = []
    source_path = directory / "source"
    source = bytearray(os.urandom(4_000_000))
    shard = Shard(source_path, Fingerprint(0, 0, 0, 0, 0), ShardHeader((), {}, 0, 0, ""))
    for computed, size, pages, beside in runs:
        content += os.urandom(computed)
        shift = pages * PAGE + beside
        if len(content) + shift < 0:
            shift = beside
        begin = len(content)
        content += source[begin + shift : begin + shift + size]
        copied.append(FileCopy(begin, len(content), shard, shift))
    content += os.urandom(5)
    source_path.write_bytes(source)
    calls = 0

    def copy(one: int, one_offset: int, other: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        assert one_offset % PAGE == offset % PAGE == size % PAGE == 0
        if calls == broken:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        os.pwrite(other, os.pread(one, size, one_offset), offset)

    with pytest.MonkeyPatch.context() as patch, source_path.open("rb") as opened:
        patch.setattr(output, "share", copy)
        patch.setattr(sharing, "file_copies", lambda *_: copied)
        written = Output(directory / "out", len(content))
        shared = Sharing(written, NO_FILE, {}, Lender(opened.fileno()))  # type: ignore[arg-type]
        offset = 0
        for pages in itertools.cycle(cuts):
            if offset >= len(content):
                break
            buffer = mmap.mmap(-1, pages * PAGE)
            view = memoryview(buffer)[: len(content) - offset]
            view[:] = content[offset : offset + len(view)]
            there = shared.share(offset, len(view))
            for begin, end in there:
                assert any(one.begin <= begin < end <= one.end for one in copied)
                view[begin - offset : end - offset] = bytes(end - begin)  # so that it must not be written
            written.write(view, offset, there)
            offset += len(view)
        written.close()
    assert (directory / "out").read_bytes() == content
    shutil.rmtree(directory)


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", MIB)
    monkeypatch.setattr(durability, "SYNC_BYTES", MIB)


def test_work_with_shared_pieces_is_gone_on_with(
    disk: Disk, out: Path, tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, times = passed_through(tmp_path, disk.models), 0
    expected = write(recipe, tmp_path / "expected").manifest
    real = output.share

    def share_or_stop(*arguments: int) -> None:
        nonlocal times
        times += 1
        if times > 8:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output, "share", share_or_stop)
        with pytest.raises(KeyboardInterrupt):
            write(recipe, out)
    assert not out.exists()
    result = write(recipe, out, interrupted=Interrupted.RESUME)
    assert result.manifest == expected == verify(out).manifest
    assert result.reused_bytes >= 7 * MIB
    assert result.shared_bytes > SLACK
    assert result.reused_bytes + result.shared_bytes < result.bytes_written


def test_a_source_that_is_written_to_before_it_is_shared_is_noticed(
    disk: Disk, out: Path, tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes were hashed as they were, and other ones would lie in the model."""
    model = disk.place / "place" / "model"
    shutil.copytree(disk.models.experts[0], model)
    os.sync()
    recipe = passed_through(tmp_path, Family(model, (model,)))
    real = output.share

    def write_first(source: int, offset: int, *others: int) -> None:
        with open(f"/proc/self/fd/{source}", "r+b") as file:  # noqa: PTH123 (the descriptor's own file)
            file.seek(offset)
            file.write(b"other bytes")
        real(source, offset, *others)

    monkeypatch.setattr(output, "share", write_first)
    with pytest.raises(SourceChangedError, match="was written to since the plan was made"):
        write(recipe, out)
    assert not out.exists()
    for name, parts in _journal(out):
        assert _proven(out, name, parts)


def _journal(out: Path) -> Iterator[tuple[str, list[Part]]]:
    """Yield the finished parts of each file of work that was interrupted."""
    journal = read_journal(Staging(staging_path(out), out).journal)
    if journal is not None:
        for name, parts in journal.parts.items():
            yield name, list(parts.values())


def _proven(out: Path, name: str, parts: list[Part]) -> bool:
    """Return whether parts of such a file have the hashes that are told of them."""
    content = (Staging(staging_path(out), out).model / name).read_bytes()
    return all(blake3(content[one.offset : one.offset + one.size]).hexdigest() == one.blake3 for one in parts)


def dying(out: Path, expected: Path, call: str, number: int) -> list[str]:
    """Return what lets strace kill a run when one of its threads makes a call for a weight file for the n-th time."""
    model = Staging(staging_path(out), out).model
    weight_files = [option for path in expected.glob("*.safetensors") for option in ("-P", str(model / path.name))]
    return ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", *weight_files]


def test_a_run_that_dies_while_it_shares_leaves_nothing_and_is_gone_on_with(
    disk: Disk, out: Path, tmp_path: Path
) -> None:
    """At the first to fourth time that a thread shares something; nothing else stays on the disk in the end."""
    catalog, recipe = tmp_path / "catalog", merged(tmp_path, disk.models)
    how = ("materialize", "--threads", "2", "--budget", "20%", "--resume", recipe)
    with command_server(tmp_path, *how, tmp_path / "expected", catalog=catalog) as server:
        expected = manifest_hash(tmp_path / "expected")
        for time in range(1, 5):
            options = dying(out, tmp_path / "expected", "ioctl", time)
            assert server.run_traced(options, *how, out, catalog=catalog) == -signal.SIGKILL
            assert not out.exists()
            printed = server.run(*how, out, catalog=catalog)
            assert "with the sources, not written again" in printed
            assert verify(out).manifest == expected
            assert [path.name for path in out.parent.iterdir()] == ["out"]
            shutil.rmtree(out)


def test_what_the_journal_tells_of_shared_pieces_outlives_a_loss_of_power(tmp_path: Path) -> None:
    """XFS is shut down without writing its log, behind a run that was killed."""
    with disk_with_models(tmp_path / "disk", "xfs") as disk:
        catalog, recipe, out = tmp_path / "catalog", merged(tmp_path, disk.models), disk.place / "out"
        how = ("materialize", "--budget", "20%", "--resume", recipe)
        with command_server(tmp_path, *how, tmp_path / "expected", catalog=catalog) as server:
            options = dying(out, tmp_path / "expected", "fsync", 6)
            assert server.run_traced(options, *how, out, catalog=catalog) == -signal.SIGKILL
            lose_power(tmp_path / "disk")
            told = dict(_journal(out))
            assert sum(map(len, told.values())) >= 2
            for name, parts in told.items():
                assert _proven(out, name, parts)
            server.run(*how, out, catalog=catalog)
            assert verify(out).manifest == manifest_hash(tmp_path / "expected")
            lose_power(tmp_path / "disk")
            assert verify(out).manifest == manifest_hash(tmp_path / "expected")
