"""Interrupted work: never lost silently, gone on with as far as hashes prove it, and thrown away only when asked."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import Family, family
from damage import flip_bit
from hypothesis import given
from hypothesis import strategies as st
from mounting import environment
from recipes import MERGES, write_recipe
from sentences import Said, said_by
from weight_pieces import MIB
from workspaces import workspace

from mergefs.catalog import Catalog
from mergefs.errors import MaterializeError, VerificationError
from mergefs.materialize import durability, output, weights
from mergefs.materialize import run as run_module
from mergefs.materialize.journal import Journal, Part, Prepared, Read, Work, read_journal
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.materialize import Interrupted, Materialized, materialize
from mergefs.materialize.staging import Staging, staging_path
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of 26 pieces."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, hidden=512, layers=1, vocabulary=11000
    )


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def write(
    recipe: Path, out: Path, interrupted: Interrupted = Interrupted.REFUSE, overwrite: bool = False
) -> Materialized:
    with workspace() as resources:
        plan = make_plan(load_recipe(recipe), PlanOptions(), resources, identified=True)
        return materialize(plan, out, resources, overwrite, interrupted=interrupted)


@pytest.fixture
def expected(recipe: Path, tmp_path: Path) -> str:
    """The hash of the manifest that every run must come to in the end."""
    return write(recipe, tmp_path / "expected").manifest


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 2 * MIB)
    monkeypatch.setattr(durability, "SYNC_BYTES", 4 * MIB)


@pytest.fixture
def interrupted(recipe: Path, out: Path, small_steps: None, expected: str) -> Staging:
    """Work of which 12 MiB are finished, and two more were just written when it was interrupted."""
    interrupt(recipe, out, 13)
    return Staging(staging_path(out), out)


def interrupt(recipe: Path, out: Path, size: int, **how: bool) -> None:
    """Let a run be interrupted by Ctrl-C when it has written so many MiB behind what was finished before."""
    real = output.write_all
    journal = read_journal(Staging(staging_path(out), out).journal)
    last = (size - 1) * MIB + (0 if journal is None else journal.finished_bytes)

    def write_or_stop(descriptor: int, data: memoryview, offset: int | None = None) -> None:
        real(descriptor, data, offset)
        if offset is not None and offset + len(data) > last:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_all", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            write(recipe, out, Interrupted.RESUME, **how)


def run(recipe: Path, out: Path, *options: str) -> Said:
    return said_by("materialize", *options, recipe, out)


def states() -> list[str]:
    with Catalog(Path(os.environ["MERGEFS_CATALOG"])) as catalog:
        return sorted(record.state for record in catalog.transactions())


# Finding it -----------------------------------------------------------------------------------------------------------


def test_the_next_run_says_what_it_finds_and_leaves_it(interrupted: Staging, recipe: Path, out: Path) -> None:
    before = interrupted.journal.read_bytes()
    said = run(recipe, out)
    assert said.status == 1
    assert f"{out}: an interrupted run has left 12.0 MiB of 26" in said.stderr
    assert "go on with --resume, or throw that away and start anew with --fresh" in said.stderr
    assert interrupted.journal.read_bytes() == before
    assert not out.exists()


def test_an_interrupted_command_says_how_to_go_on(recipe: Path, out: Path, small_steps: None) -> None:
    real = output.write_all

    def stop(descriptor: int, data: bytes, offset: int | None = None) -> None:
        real(descriptor, data, offset)
        if offset == 6 * MIB:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_all", stop)
        said = run(recipe, out)
    assert said.status == 130
    assert f"{out} is kept in {staging_path(out)}; go on with --resume, or use --fresh" in said.stderr


def test_resuming_reads_only_what_is_left(interrupted: Staging, recipe: Path, out: Path, expected: str) -> None:
    result = write(recipe, out, Interrupted.RESUME)
    assert result.reused_bytes == 12 * MIB
    assert result.totals.expert_bytes_read < 0.6 * 2 * result.bytes_written
    assert result.manifest == expected == manifest_hash(out)
    assert list(out.parent.iterdir()) == [out]
    assert states() == ["committed", "committed"]  # the expected model, and this one: two runs, one transaction


def test_the_manifest_tells_what_all_runs_have_read(interrupted: Staging, recipe: Path, out: Path) -> None:
    from mergefs.materialize.manifest import read_manifest

    write(recipe, out, Interrupted.RESUME)
    manifest = read_manifest(out)
    assert manifest.cost.expert_bytes_read >= manifest.cost.expert_bytes_planned


def test_fresh_starts_anew(interrupted: Staging, recipe: Path, out: Path, expected: str) -> None:
    result = write(recipe, out, Interrupted.DISCARD)
    assert (result.reused_bytes, result.manifest) == (0, expected)
    assert states() == ["aborted", "committed", "committed"]
    assert list(out.parent.iterdir()) == [out]


def test_resuming_where_nothing_was_begun_is_a_run_like_any_other(recipe: Path, out: Path, expected: str) -> None:
    assert write(recipe, out, Interrupted.RESUME).manifest == expected


def test_resuming_and_starting_anew_at_once_is_refused(recipe: Path, out: Path) -> None:
    said = run(recipe, out, "--resume", "--fresh")
    assert said.status == 2
    assert "--resume goes on with what --fresh throws away" in said.stderr


def test_work_on_another_plan_is_neither_used_nor_lost(
    interrupted: Staging, models: Family, out: Path, tmp_path: Path
) -> None:
    other = write_recipe(tmp_path / "other.yml", MERGES["linear without a base"], models)
    with pytest.raises(MaterializeError, match=r"interrupted run of another plan, \w+, has left 12.0 MiB of .*; throw"):
        write(other, out, Interrupted.RESUME)
    assert interrupted.journal.exists()
    assert write(other, out, Interrupted.DISCARD).reused_bytes == 0


def test_what_was_written_by_another_version_is_computed_anew(
    interrupted: Staging, recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "__version__", "0.0.0")
    assert write(recipe, out, Interrupted.RESUME).reused_bytes == 0
    assert list(out.parent.iterdir()) == [out]


def test_interruptions_may_follow_each_other(interrupted: Staging, recipe: Path, out: Path, expected: str) -> None:
    for _ in range(3):
        interrupt(recipe, out, 3)
    result = write(recipe, out, Interrupted.RESUME)
    assert result.reused_bytes == 18 * MIB
    assert result.manifest == expected


def test_an_interrupted_replacement_leaves_the_old_model_until_it_is_done(
    recipe: Path, models: Family, out: Path, tmp_path: Path, small_steps: None, expected: str
) -> None:
    old = write(write_recipe(tmp_path / "old.yml", MERGES["linear without a base"], models), out).manifest
    interrupt(recipe, out, 4, overwrite=True)
    assert manifest_hash(out) == old
    with pytest.raises(MaterializeError, match="an interrupted run has left"):
        write(recipe, out, overwrite=True)
    assert write(recipe, out, Interrupted.RESUME, overwrite=True).manifest == expected == manifest_hash(out)
    assert list(out.parent.iterdir()) == [out]


def test_a_model_that_an_interrupted_run_has_finished_after_all_is_checked_and_left(
    recipe: Path, out: Path, expected: str
) -> None:
    write(recipe, out)
    result = write(recipe, out, Interrupted.RESUME)
    assert (result.already_there, result.manifest) == (True, expected)
    said = run(recipe, out, "--resume")
    assert f"{out}: is complete already, and as it was written: manifest {expected}" in said.stdout
    flip_bit(out / WEIGHTS, 8 * 5 * MIB)
    with pytest.raises(VerificationError, match="piece 5"):
        write(recipe, out, Interrupted.RESUME)


# Trusting it ----------------------------------------------------------------------------------------------------------


def truncate(stage: Staging) -> None:
    os.truncate(stage.model / WEIGHTS, 3 * MIB + 7)


def lengthen(stage: Staging) -> None:
    os.truncate(stage.model / WEIGHTS, 100 * MIB)


def flip(stage: Staging) -> None:
    flip_bit(stage.model / WEIGHTS, 8 * (9 * MIB + 5))


def lose(stage: Staging) -> None:
    (stage.model / WEIGHTS).unlink()


def replace_by_a_link(stage: Staging) -> None:
    (stage.model / WEIGHTS).rename(stage.path.parent / "elsewhere")
    (stage.model / WEIGHTS).symlink_to(stage.path.parent / "elsewhere")


def add_files(stage: Staging) -> None:
    (stage.model / "deep" / "er").mkdir(parents=True)
    (stage.model / "deep" / "er" / "other.safetensors").write_bytes(b"x")
    (stage.model / "config.json").write_text("{}")


DAMAGES: dict[str, tuple[Callable[[Staging], None], int]] = {
    "nothing": (lambda _: None, 12),
    "truncated": (truncate, 2),
    "longer": (lengthen, 12),
    "a flipped bit": (flip, 10),
    "lost": (lose, 0),
    "a link": (replace_by_a_link, 0),
    "other files": (add_files, 12),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_what_hashes_prove_is_used_again(
    interrupted: Staging, recipe: Path, out: Path, expected: str, damage: str
) -> None:
    spoil, reused = DAMAGES[damage]
    spoil(interrupted)
    result = write(recipe, out, Interrupted.RESUME)
    assert result.reused_bytes == reused * MIB
    assert result.manifest == expected == manifest_hash(out)
    assert not (out / "deep").exists()


def test_a_journal_that_is_cut_off_anywhere_proves_what_is_whole_of_it(
    interrupted: Staging, recipe: Path, out: Path, expected: str
) -> None:
    whole = interrupted.journal.read_bytes()
    interrupted.journal.write_bytes(whole[: len(whole) // 2])
    result = write(recipe, out, Interrupted.RESUME)
    assert 0 < result.reused_bytes < 12 * MIB
    assert result.manifest == expected


def test_a_journal_without_its_beginning_proves_nothing(interrupted: Staging, recipe: Path, out: Path) -> None:
    interrupted.journal.write_bytes(b"nonsense\n" + interrupted.journal.read_bytes())
    assert write(recipe, out).reused_bytes == 0  # as if there were no work: nobody could go on with it


def test_a_lost_catalog_loses_no_work(
    interrupted: Staging, recipe: Path, out: Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEFS_CATALOG", str(tmp_path / "another catalog"))
    result = write(recipe, out, Interrupted.RESUME)
    assert (result.reused_bytes, result.manifest) == (12 * MIB, expected)


def test_a_merge_without_a_finite_result_leaves_nothing_to_go_on_with(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    from mergefs.engine.model_files import ModelFiles
    from mergefs.errors import NonFiniteError

    real = ModelFiles.read_into

    def fail(files: ModelFiles, name: str, offset: int, view: memoryview) -> None:
        if offset > 10 * MIB:
            raise NonFiniteError("the merge of a tensor has NaN in it")
        real(files, name, offset, view)

    monkeypatch.setattr(ModelFiles, "read_into", fail)
    with pytest.raises(NonFiniteError):
        write(recipe, out)
    assert not out.parent.exists()


# Recovery behind the rename -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_dies_behind_the_rename_was_committed(
    recipe: Path, models: Family, out: Path, tmp_path: Path, expected: str, overwrite: bool
) -> None:
    if overwrite:
        write(write_recipe(tmp_path / "old.yml", MERGES["linear without a base"], models), out)

    def die(stage: Staging) -> NoReturn:
        real(stage)
        os._exit(9)

    real = Staging.commit
    pid = os.fork()
    if pid == 0:
        Staging.commit = die  # type: ignore[method-assign]
        write(recipe, out, overwrite=overwrite)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert manifest_hash(out) == expected
    assert "prepared" in states()
    assert write(recipe, out, Interrupted.RESUME).already_there
    assert states() == ["committed"] * (2 + overwrite)
    assert list(out.parent.iterdir()) == [out]


def test_a_signal_right_behind_the_rename_does_not_make_it_undone(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    real = Staging.commit

    def commit(stage: Staging) -> NoReturn:
        real(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        write(recipe, out)
    assert manifest_hash(out) == expected
    assert states() == ["committed", "committed"]


def test_a_killed_command_is_gone_on_with_by_another_process(
    recipe: Path, out: Path, expected: str, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "from mergefs.materialize import durability, output, weights\n"
        "from mergefs.cli import main\n"
        "weights.CHUNK = durability.SYNC_BYTES = 2 * 2**20\n"
        "real, count = output.write_all, 0\n"
        "def write_all(*arguments):\n"
        "    global count\n"
        "    real(*arguments)\n"
        "    count += 1\n"
        "    if count == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "output.write_all = write_all\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "materialize", str(recipe), str(out)]
    process = subprocess.run(command, env=environment(tmp_path / "state"), capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    said = run(recipe, out, "--resume")
    assert said.status == 0, said.stderr
    assert " of it from an interrupted run" in said.stdout
    assert manifest_hash(out) == expected


# The journal ----------------------------------------------------------------------------------------------------------

names = st.text(max_size=20)
WORK = Work("t" * 32, "plan", "1", "layout", 10 * MIB)
sizes = st.integers(0, 2**40)
parts = st.builds(Part, names, st.integers(0, 1000), sizes, st.text("0123456789abcdef", max_size=64))
others = st.one_of(
    st.builds(Read, st.integers(0, 3), st.integers(0, 2**40), st.integers(0, 2**40)),
    st.builds(Prepared, st.text(max_size=64)),
)


@given(st.lists(st.one_of(parts, others), max_size=20), st.data())
def test_every_beginning_of_a_journal_tells_of_whole_lines_only(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Part | Read | Prepared], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal.begin(path, WORK)
    for entry in entries:
        journal.append([entry])
    journal.close()
    whole = path.read_bytes()
    assert whole.count(b"\n") == len(entries) + 1
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    recorded = read_journal(path)
    lines = whole[:cut].count(b"\n")
    if lines == 0:
        assert recorded is None
        return
    assert recorded is not None
    assert recorded.valid_bytes == whole[:cut].rfind(b"\n") + 1
    told = {(name, offset): part for name, found in recorded.parts.items() for offset, part in found.items()}
    seen = entries[: lines - 1]
    assert told == {(one.file, one.offset): one for one in seen if isinstance(one, Part)}
    assert recorded.finished_bytes == sum(part.size for part in told.values())
    prepared = [one.manifest for one in seen if isinstance(one, Prepared)]
    assert recorded.prepared == (prepared[-1] if prepared else None)


@given(st.data())
def test_a_flipped_bit_ends_a_journal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal.begin(path, WORK)
    journal.append([Part(WEIGHTS, index, 1, "0" * 64) for index in range(5)])
    journal.close()
    whole = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    line = whole[: bit // 8].count(b"\n")
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    recorded = read_journal(path)
    assert (0 if recorded is None else 1 + recorded.finished_bytes) == line
