"""``catalog gc``: what nothing needs is removed, what a model, a mount or a run could use is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoints import Family, family
from mounting import environment, mounted_recipes
from recipes import MERGES, write_recipe
from sound_catalog import RECORDS

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.catalog.check.run import check
from mergefs.catalog.records import ContentRecord, TransactionRecord, VocabularyRecord
from mergefs.catalog.schema import SCHEMA
from mergefs.cli import main
from mergefs.engine.workspace import Workspace
from mergefs.materialize.manifest import read_manifest
from mergefs.materialize.staging import locked, staging_path
from mergefs.planner.build import Planning, PlanOptions, make_plan
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.upkeep import garbage
from mergefs.upkeep.collection import Collected, collect
from mergefs.upkeep.garbage import STATISTICS, Model, Needs


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "ties.yml", MERGES["ties"], models)


@pytest.fixture
def place() -> Path:
    return Path(os.environ["MERGEFS_CATALOG"])


def gather(recipe: Path, planes: bool = False) -> bytes:
    """Plan the merge under a budget, so that every statistic is gathered, and return its weights."""
    if planes:
        assert main(["analyze", str(recipe), "--planes", "1"]) == 0
    with open_model(recipe, budget="50%") as model:
        return model.read_file("model.safetensors")


def analysed(recipe: Path, place: Path) -> int:
    """Plan the merge and return the bytes that had to be read for statistics."""
    resources = Workspace.create(Catalog(place))
    try:
        make_plan(load_recipe(recipe), PlanOptions("50%"), resources)
        return resources.ledger.totals().analysis_bytes_read
    finally:
        resources.close()


def run_gc(
    place: Path, days: int = 0, dry_run: bool = False, compact: bool = False, plans: tuple[str, ...] = ()
) -> Collected:
    with Catalog(place) as catalog:
        return collect(catalog, Needs(plans, days), dry_run, compact)


def counts(place: Path) -> dict[str, int]:
    with Catalog(place) as catalog:
        return catalog.counts()


def kinds(result: Collected) -> dict[str, int]:
    return {one.kind: one.count for one in result.removed}


@contextmanager
def a_reader(place: Path) -> Iterator[None]:
    """Have another process keep the catalog open."""
    code = (
        "import sys; from pathlib import Path; from mergefs.catalog import Catalog\n"
        "catalog = Catalog(Path(sys.argv[1]))\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(place)
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


# Statistics and models ------------------------------------------------------------------------------------------------


def test_what_models_that_are_there_could_use_is_kept(recipe: Path, place: Path) -> None:
    gather(recipe, planes=True)
    before = counts(place)
    assert {"contents", "deltas", "planes", "histograms", "thresholds"} <= {name for name in before if before[name]}
    result = run_gc(place)
    assert set(kinds(result)) <= {"plans", "entries", "readings"}
    after = counts(place)
    for table in (*STATISTICS, "checkpoints"):
        assert after[table] == before[table]
    assert check(place).findings == ()


def test_statistics_of_a_model_that_is_gone_are_removed_and_those_of_others_are_not(
    recipe: Path, models: Family, place: Path, tmp_path: Path
) -> None:
    gather(recipe, planes=True)
    other = family(tmp_path / "others", experts=2, dtype=torch.bfloat16, tied=False, shards=1, seed=50)
    gather(write_recipe(tmp_path / "other.yml", MERGES["ties"], other))
    before = counts(place)
    shutil.rmtree(other.base.parent)
    result = run_gc(place)
    assert kinds(result)["checkpoints"] == 3
    assert kinds(result)["deltas"] == before["deltas"] // 2
    after = counts(place)
    assert after["checkpoints"] == 3
    assert check(place).findings == ()
    assert analysed(recipe, place) == 0
    shutil.rmtree(models.base.parent)
    run_gc(place)
    assert {table: count for table, count in counts(place).items() if count} == {}
    assert not list((place / "planes").iterdir())


def test_a_copied_model_keeps_the_statistics_that_are_known_by_content(
    recipe: Path, models: Family, place: Path, tmp_path: Path
) -> None:
    gather(recipe)
    shutil.copytree(models.base.parent, tmp_path / "copy")
    copy = Family(tmp_path / "copy" / "base", tuple(tmp_path / "copy" / one.name for one in models.experts))
    copied = write_recipe(tmp_path / "copied.yml", MERGES["ties"], copy)
    expected = gather(copied)
    deltas = counts(place)["deltas"]
    shutil.rmtree(models.base.parent)
    run_gc(place)
    assert counts(place)["deltas"] == deltas
    assert gather(copied) == expected


def test_a_model_that_is_absent_is_waited_for_with_all_statistics(
    recipe: Path, models: Family, place: Path, tmp_path: Path
) -> None:
    gather(recipe)
    before = counts(place)
    models.base.parent.rename(tmp_path / "unplugged")
    result = run_gc(place, days=30)
    assert any("statistics are kept, since some may be about" in note for note in result.kept)
    after = counts(place)
    assert {table: after[table] for table in (*STATISTICS, "checkpoints")} == {
        table: before[table] for table in (*STATISTICS, "checkpoints")
    }
    (tmp_path / "unplugged").rename(models.base.parent)
    assert analysed(recipe, place) == 0


def test_a_model_that_was_overwritten_is_gone_at_once(recipe: Path, models: Family, place: Path) -> None:
    gather(recipe)
    expert = models.experts[0] / "model.safetensors"
    expert.write_bytes(expert.read_bytes())
    result = run_gc(place, days=30)
    assert kinds(result)["checkpoints"] == 1
    assert kinds(result)["plans"] == 1


def test_statistics_that_are_about_nothing_known_are_left(place: Path) -> None:
    with Catalog(place) as catalog:
        catalog.keep_number(b"n" * 24, 1.0)
        catalog.keep_content(b"c" * 24, ContentRecord(bytes(24), b""), b"c" * 24)
    result = run_gc(place)
    assert kinds(result) == {"contents": 1}
    assert counts(place)["numbers"] == 1


def test_vocabularies_are_removed_once_they_are_old(place: Path) -> None:
    record = RECORDS["vocabularies"][1]
    assert isinstance(record, VocabularyRecord)
    with Catalog(place) as catalog:
        catalog.keep_vocabulary(bytes(32), record)
    assert kinds(run_gc(place, days=1)) == {}
    assert kinds(run_gc(place, days=0)) == {"vocabularies": 1}


# Plans and runs -------------------------------------------------------------------------------------------------------


def test_a_plan_that_nothing_uses_is_removed_with_its_parts_once_it_is_old(recipe: Path, place: Path) -> None:
    gather(recipe)
    assert counts(place)["plans"] >= 1
    assert "plans" not in kinds(run_gc(place, days=1))
    run_gc(place, days=0)
    assert {table: counts(place)[table] for table in ("plans", "entries", "readings")} == {
        "plans": 0,
        "entries": 0,
        "readings": 0,
    }


def test_a_plan_that_was_written_is_kept_for_its_lineage(recipe: Path, place: Path, tmp_path: Path) -> None:
    assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 0
    asked = read_manifest(tmp_path / "out").plan_id
    before = counts(place)
    assert (before["plans"], before["readings"]) == (2, 1)  # it was begun before the inputs were known
    shutil.rmtree(tmp_path / "out")
    run_gc(place)
    after = counts(place)
    assert (after["plans"], after["transactions"], after["readings"]) == (1, 1, 1)
    with Catalog(place) as catalog:
        assert [plan.plan_id[:16] for plan in catalog.plans()] == [asked]


def test_what_another_process_is_analysing_is_kept_until_it_has_planned(recipe: Path, place: Path) -> None:
    with Catalog(place) as catalog:
        planning = Planning(load_recipe(recipe), PlanOptions("50%"), Workspace.create(catalog), Silence())
        planning.analyze()
        catalog.flush()
        assert not run_gc(place).removed
        assert planning.within("50%").outcome.expert_bytes_planned > 0


def test_what_is_told_of_while_garbage_is_looked_for_is_kept(
    recipe: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = family(tmp_path / "other", experts=2, dtype=torch.bfloat16, tied=False, shards=1, seed=7)
    gather(recipe)
    real = garbage._live

    def meanwhile(catalog: Catalog, models: Mapping[bytes, Model]) -> set[bytes]:
        monkeypatch.setattr(garbage, "_live", real)
        live = real(catalog, models)
        gather(write_recipe(tmp_path / "other.yml", MERGES["ties"], other))
        return live

    monkeypatch.setattr(garbage, "_live", meanwhile)
    assert not run_gc(place, days=1).removed
    assert garbage._live is real
    assert analysed(tmp_path / "other.yml", place) == 0


def test_a_plan_that_a_mount_shows_is_kept(directory: Path, place: Path) -> None:
    recipe = write_recipe(
        directory / "slerp.yml",
        MERGES["slerp"],
        family(directory / "models", experts=1, dtype=torch.bfloat16, tied=False, shards=1),
    )
    with mounted_recipes(recipe, mountpoint=directory / "mount", state=directory / "state") as mount:
        assert main(["catalog", "gc", "--older-than", "0"]) == 0
        assert counts(place)["plans"] == 1
        assert (mount.mountpoint / "model.safetensors").read_bytes()
    assert main(["catalog", "gc", "--older-than", "0"]) == 0
    assert counts(place)["plans"] == 0


def interrupted(recipe: Path, destination: Path) -> None:
    """Have a run killed after a part of its work."""
    code = (
        "import os, signal, sys\n"
        "from mergefs.materialize import staging\n"
        "staging.Staging.commit = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from mergefs.cli import main\n"
        "main(['materialize', *sys.argv[1:]])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, recipe, destination], env=environment(recipe.parent), check=False
    )
    assert finished.returncode == -signal.SIGKILL


def test_unfinished_work_is_kept_until_it_is_old_and_then_removed(recipe: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(recipe, out)
    staged = staging_path(out)
    assert staged.is_dir()
    assert "staging" not in kinds(run_gc(place, days=1))
    assert staged.is_dir()
    assert kinds(run_gc(place, days=0, dry_run=True))["staging"] == 1
    assert staged.is_dir()
    assert kinds(run_gc(place, days=0))["staging"] == 1
    assert not staged.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"models", "ties.yml"}
    assert kinds(run_gc(place, days=0)).get("transactions") in (None, 1)
    assert counts(place)["transactions"] == 0
    assert check(place).findings == ()


def test_work_in_progress_is_never_touched(recipe: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(recipe, out)
    before = counts(place)
    with locked(out):
        assert "staging" not in kinds(run_gc(place))
        assert staging_path(out).is_dir()
    assert counts(place)["transactions"] == before["transactions"]


# Files and space ------------------------------------------------------------------------------------------------------


def test_files_that_no_record_names_are_removed_while_nobody_else_has_the_catalog_open(place: Path) -> None:
    Catalog(place).close()
    (place / "planes").mkdir()
    for path in (place / "planes" / "orphan.planes", place / "data.mdb.damaged"):
        path.write_bytes(bytes(10_000))
    (place / "salvage").mkdir()
    with a_reader(place):
        result = run_gc(place)
        assert kinds(result) == {}
        assert sum("is kept, since process" in note for note in result.kept) == 3
    assert kinds(run_gc(place)) == {"plane files": 1, "leftovers": 2}
    assert {path.name for path in place.iterdir()} == {"data.mdb", "lock.mdb", "users.lock", "planes"}


def test_compaction_gives_free_pages_back_and_keeps_every_record(place: Path) -> None:
    with Catalog(place) as catalog:
        for number in range(200):
            catalog.keep_content(number.to_bytes(24, "big"), ContentRecord(bytes(24), os.urandom(32_000)))
        catalog.flush()
        for kept in catalog.kept("contents")[1:]:
            catalog.remove([("contents", kept)])
        size = catalog.size_on_disk()
        (record,) = catalog.kept("contents")
    with a_reader(place):
        assert any("not compacted, since process" in note for note in run_gc(place, compact=True).kept)
    result = run_gc(place, compact=True)
    assert result.after["free"] < result.before["free"] / 10
    with Catalog(place) as catalog:
        assert catalog.size_on_disk() < size / 10
        assert catalog.kept("contents") == [record]
        catalog.keep_number(b"n" * 24, 1.0)
        catalog.flush()
        assert catalog.number(b"n" * 24) == 1.0
    assert check(place).findings == ()


def test_a_record_that_was_written_anew_meanwhile_is_kept(place: Path) -> None:
    with Catalog(place) as catalog:
        catalog.keep_content(b"c" * 24, ContentRecord(bytes(24), b""), b"c" * 24)
        catalog.flush()
        (old,) = catalog.kept("contents")
        catalog.keep_content(b"c" * 24, ContentRecord(bytes(24), bytes(32)), b"c" * 24)
        catalog.flush()
        assert catalog.remove([("contents", old)]) == 0
        assert catalog.counts()["contents"] == 1


def test_the_command_shows_what_was_removed_and_the_space(
    recipe: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gather(recipe)
    before = counts(place)
    capsys.readouterr()
    assert main(["catalog", "gc", "--older-than", "0", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {one["kind"] for one in report["removed"]} >= {"plans", "entries"}
    assert counts(place) == before
    assert main(["catalog", "gc", "--older-than", "0"]) == 0
    said = capsys.readouterr().out
    assert "plans" in said
    assert "before" in said
    assert main(["catalog", "gc", "--older-than", "0", "--dry-run"]) == 0
    assert capsys.readouterr().out == "nothing is there that is not needed\n"
    assert main(["catalog", "info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert set(info["bytes"]) == {"meta", *SCHEMA, "free", "plane files"}
    assert msgspec.json.encode(info)


# Races ----------------------------------------------------------------------------------------------------------------


def test_a_plan_that_a_run_begins_to_write_meanwhile_is_kept(recipe: Path, place: Path) -> None:
    gather(recipe)
    record = RECORDS["transactions"][1]
    assert isinstance(record, TransactionRecord)
    with Catalog(place) as catalog:
        (plan,) = catalog.kept("plans")
        entries = catalog.kept("entries")
        begun = msgspec.structs.replace(record, plan_id=plan.record.plan_id, state="begun", manifest="")
        assert catalog.begin_transaction(begun)
        assert catalog.remove([("plans", plan), *(("entries", entry) for entry in entries)]) == 0
        assert catalog.counts()["entries"] == len(entries) > 0


def test_a_run_whose_plan_was_removed_meanwhile_says_to_run_again(
    recipe: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Catalog.begin_transaction

    def begin(catalog: Catalog, record: TransactionRecord) -> bool:
        catalog.remove([("plans", kept) for kept in catalog.kept("plans")])
        return real(catalog, record)

    monkeypatch.setattr(Catalog, "begin_transaction", begin)
    assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 1
    assert "was removed from" in capsys.readouterr().err
    assert counts(place)["transactions"] == 0
    monkeypatch.undo()
    monkeypatch.setenv("MERGEFS_CATALOG", str(place))
    assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 0


def test_what_was_read_of_a_plan_that_was_removed_is_not_kept(recipe: Path, place: Path) -> None:
    with open_model(recipe, catalog=place) as model, Catalog(place) as catalog:
        model.read_file("model.safetensors")
        catalog.remove([(table, kept) for table in ("plans", "entries") for kept in catalog.kept(table)])
    assert counts(place)["readings"] == 0
    assert check(place).findings == ()
