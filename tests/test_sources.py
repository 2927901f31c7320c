"""Sources that change after the plan was made: noticed when a file is opened, named, and of no harm to other models."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from mounting import mounted_recipes
from recipes import MERGES, Merge, write_recipe

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint
from mergefs.engine.workspace import Workspace
from mergefs.errors import SourceChangedError, SourceReadError
from mergefs.materialize.materialize import materialize
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import reader as reader_module
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.reader import SourceReader

WEIGHTS = "model.safetensors"


def touch(path: Path) -> None:
    os.utime(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def replace_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": touch,
    "truncated": truncate,
    "replaced": replace_by_a_copy,
    "written to": write_in_place,
    "deleted": Path.unlink,
}


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)


def recipes_of(models: Family, directory: Path) -> tuple[Path, Path]:
    """Return a recipe with the first expert alone, and one with the second alone."""
    merge = Merge("task_arithmetic", ({"weight": 0.5},))
    first, second = (
        write_recipe(directory / f"{name}.yml", merge, Family(models.base, (expert,)))
        for name, expert in zip(("first", "second"), models.experts, strict=True)
    )
    return first, second


@pytest.mark.parametrize("change", CHANGES)
def test_a_mount_answers_estale_for_what_cannot_be_merged_any_more_and_serves_the_rest(
    models: Family, tmp_path: Path, change: str
) -> None:
    recipes = recipes_of(models, tmp_path)
    mountpoint = tmp_path / "mnt"
    spoilt = models.experts[1] / WEIGHTS
    with mounted_recipes(*recipes, mountpoint=mountpoint, state=tmp_path / "state", allowed=["ESTALE"]) as mount:
        before = {path: path.read_bytes() for path in sorted((mountpoint / "first").iterdir())}
        small = {path: path.read_bytes() for path in (mountpoint / "second").iterdir() if path.name != WEIGHTS}
        CHANGES[change](spoilt)

        for _ in range(2):
            with pytest.raises(OSError) as caught:
                (mountpoint / "second" / WEIGHTS).read_bytes()
            assert caught.value.errno == errno.ESTALE
        assert f"{spoilt}: " in mount.log()
        for path, content in (before | small).items():
            assert path.read_bytes() == content
        assert (mountpoint / "second" / WEIGHTS).stat().st_size > 0


def test_a_tokenizer_file_that_changed_is_stale_alone(models: Family, tmp_path: Path) -> None:
    recipe, _ = recipes_of(models, tmp_path)
    mountpoint = tmp_path / "mnt"
    with mounted_recipes(recipe, mountpoint=mountpoint, state=tmp_path / "state", allowed=["ESTALE"]):
        (models.base / "tokenizer.json").write_text("{}")
        with pytest.raises(OSError) as caught:
            (mountpoint / "tokenizer.json").read_bytes()
        assert caught.value.errno == errno.ESTALE
        assert (mountpoint / WEIGHTS).read_bytes()
        assert (mountpoint / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("change", CHANGES)
def test_the_python_interface_names_the_file_that_changed(models: Family, tmp_path: Path, change: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    with open_model(recipe) as model:
        CHANGES[change](models.experts[0] / WEIGHTS)
        with pytest.raises(SourceChangedError) as caught:
            model.get_tensor("lm_head.weight")
    assert str(caught.value).startswith(f"{models.experts[0] / WEIGHTS}: ")
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("change", CHANGES)
def test_materialize_refuses_a_source_that_changed_since_the_plan(models: Family, tmp_path: Path, change: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    plan = make_plan(load_recipe(recipe), PlanOptions(), resources)
    CHANGES[change](models.experts[1] / WEIGHTS)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceChangedError, match=str(models.experts[1] / WEIGHTS)):
        materialize(plan, tmp_path / "out", resources)
    resources.close()
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_shrinks_while_it_is_open_is_never_taken_for_shorter_data(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe) as model:
        model.get_tensor("lm_head.weight")  # opens every file
        os.truncate(models.experts[0] / WEIGHTS, 5000)
        with pytest.raises(SourceChangedError, match="ends before byte"):
            model.get_tensor("model.norm.weight")


# The reader -----------------------------------------------------------------------------------------------------------


def source(path: Path, content: bytes) -> AuxiliaryFile:
    path.write_bytes(content)
    return AuxiliaryFile(path, Fingerprint.of(path.stat()), path.name)


def test_the_reader_returns_what_was_asked_for_and_counts_it_by_purpose(tmp_path: Path) -> None:
    ledger = Ledger()
    reader = SourceReader(ledger)
    file = source(tmp_path / "file", bytes(range(256)))
    for purpose in Purpose:
        assert reader.read(file, 10, 20, purpose).tobytes() == bytes(range(10, 30))
    assert reader.read(file, 256, 0, Purpose.BASE).size == 0
    reader.close()
    totals = ledger.totals()
    assert {name: getattr(totals, name) for name in totals.__slots__} == {
        "expert_bytes_read": 20,
        "expert_bytes_reread": 20,
        "base_bytes_read": 20,
        "analysis_bytes_read": 20,
        "auxiliary_bytes_read": 20,
        "bytes_served": 0,
    }


def test_short_reads_of_the_system_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    ledger = Ledger()
    reader = SourceReader(ledger)
    content = os.urandom(100)
    assert reader.read(source(tmp_path / "file", content), 3, 90, Purpose.EXPERT).tobytes() == content[3:93]
    assert ledger.totals().expert_bytes_read == 90
    reader.close()


class FailingDisk:
    """Lets the first ``times`` reads fail, and notes the descriptors of all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
        self.descriptors: list[int] = []
        real = os.preadv

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            self.descriptors.append(descriptor)
            if len(self.descriptors) <= times:
                raise OSError(code, os.strerror(code))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(reader_module, "_PAUSES", (0.0, 0.0, 0.0))


def test_a_disk_that_fails_is_tried_four_times_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = source(tmp_path / "file", b"x" * 100)
    disk = FailingDisk(monkeypatch, errno.EIO, 100)
    ledger = Ledger()
    reader = SourceReader(ledger)
    with pytest.raises(SourceReadError, match=rf"{tmp_path / 'file'}: reading 50 bytes at offset 10 failed: Input"):
        reader.read(file, 10, 50, Purpose.EXPERT)
    assert len(disk.descriptors) == 4
    assert ledger.totals().expert_bytes_read == 0
    reader.close()


@pytest.mark.parametrize("times", [1, 3])
def test_a_fault_that_passes_is_a_line_in_the_log_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    content = os.urandom(100)
    file = source(tmp_path / "file", content)
    FailingDisk(monkeypatch, errno.ETIMEDOUT, times)
    ledger = Ledger()
    reader = SourceReader(ledger)
    assert reader.read(file, 10, 50, Purpose.EXPERT).tobytes() == content[10:60]
    assert ledger.totals().expert_bytes_read == 50
    said = [record.getMessage() for record in caplog.records]
    assert (
        said
        == [
            f"{file.path}: reading 50 bytes at offset 10 failed: Connection timed out; check the disk that it lies on; "
            "trying again"
        ]
        * times
    )
    reader.close()


def test_a_file_is_opened_anew_after_a_fault_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a network file system may be stale, and stays that until it is opened again."""
    file = source(tmp_path / "file", b"x" * 100)
    opened: list[Path] = []
    real = os.open

    def note(path: Path, *arguments: Any, **others: Any) -> int:
        if path == file.path:
            opened.append(path)
        return real(path, *arguments, **others)

    monkeypatch.setattr(os, "open", note)
    FailingDisk(monkeypatch, errno.ESTALE, 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = SourceReader(Ledger())
    assert reader.read(file, 0, 100, Purpose.EXPERT).tobytes() == b"x" * 100
    assert opened == [file.path] * 3
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_does_not_pass_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = source(tmp_path / "file", b"x" * 100)
    disk = FailingDisk(monkeypatch, errno.EISDIR, 100)
    reader = SourceReader(Ledger())
    with pytest.raises(SourceReadError, match="Is a directory"):
        reader.read(file, 0, 100, Purpose.EXPERT)
    assert len(disk.descriptors) == 1
    reader.close()


def test_a_disk_that_does_not_answer_holds_up_nobody_who_reads_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the file is to be opened: that can take as long as the disk wants."""
    hanging, quick = source(tmp_path / "hanging", b"h" * 10), source(tmp_path / "quick", b"q" * 10)
    begun, go_on = threading.Event(), threading.Event()
    real = os.open

    def hang(path: Path, *arguments: Any, **others: Any) -> int:
        if path == hanging.path:
            begun.set()
            assert go_on.wait(60)
        return real(path, *arguments, **others)

    monkeypatch.setattr(os, "open", hang)
    reader = SourceReader(Ledger())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.read, hanging, 0, 10, Purpose.EXPERT)
        assert begun.wait(60)
        assert reader.read(quick, 0, 10, Purpose.EXPERT).tobytes() == b"q" * 10
        assert not waiting.done()
        go_on.set()
        assert waiting.result(60).tobytes() == b"h" * 10
    reader.close()


def test_no_more_files_stay_open_than_allowed_and_none_after_closing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    files = [source(tmp_path / f"{number}", bytes([number] * 10)) for number in range(20)]
    before = descriptors()
    reader = SourceReader(Ledger(), open_files=4)
    for _ in range(2):
        for number, file in enumerate(files):
            assert reader.read(file, 0, 10, Purpose.EXPERT).tobytes() == bytes([number] * 10)
            assert descriptors() <= before + 4
    reader.close()
    assert descriptors() == before


def test_experts_are_opened_without_read_ahead_unless_they_are_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[str, int]] = []
    real = os.posix_fadvise

    def advise(descriptor: int, offset: int, length: int, kind: int) -> None:
        advice.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, kind))
        real(descriptor, offset, length, kind)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    reader = SourceReader(Ledger())
    expert, base = source(tmp_path / "expert", b"e" * 10), source(tmp_path / "base", b"b" * 10)
    for purpose in (Purpose.EXPERT, Purpose.EXPERT_AGAIN):
        reader.read(expert, 0, 5, purpose)
    reader.read(base, 0, 5, Purpose.BASE)
    reader.of_whole_tensors().read(expert, 0, 5, Purpose.EXPERT)
    reader.close()
    expected = [("expert", os.POSIX_FADV_RANDOM), ("base", os.POSIX_FADV_NORMAL), ("expert", os.POSIX_FADV_NORMAL)]
    assert advice == expected
