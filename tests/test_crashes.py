"""A run that dies at any system call, at any time, or with the power leaves the old model or the new one."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import power_loss
import pytest
from checkpoints import Family
from crashes import Point, Stage, counting, crash_models, crash_stages, die_at_random_times, points

RANDOM_TIMES = 20
FEW_POINTS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return crash_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stages(models: Family, catalogs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    with crash_stages(models, tmp_path_factory.mktemp("stage"), catalogs / "crashes") as made:
        yield made


@pytest.fixture(params=["absent", "replaced"])
def stage(request: pytest.FixtureRequest, stages: dict[str, Stage]) -> Stage:
    return stages[request.param]


def every_point(stage: Stage) -> list[Point]:
    stage.prepare()
    log = stage.directory / "log"
    assert stage.server.run_traced(counting(log), *stage.command, catalog=stage.catalog) == 0
    assert stage.check() == "new"
    return points(log)


def die_at(stage: Stage, where: list[Point]) -> set[str]:
    """Let the command die at each of these points, and recover; return the states that it has left."""
    left = set()
    for point in where:
        stage.prepare()
        status = stage.server.run_traced(point.options, *stage.command, catalog=stage.catalog)
        assert status == -signal.SIGKILL, point
        left.add(stage.check())
        stage.recover()
    return left


def test_a_run_that_dies_at_a_system_call_leaves_the_old_state_or_the_new_one(stage: Stage) -> None:
    """At a few of all points, those of the commit among them; the others are tried by ``--all``."""
    found = every_point(stage)
    last = {call: max(point.number for point in found if point.call == call) for call in ("fsync", "unlink")}
    renames = [point for point in found if point.call.startswith("rename")]
    assert renames
    chosen = [*renames, *(Point(call, number) for call, number in last.items())]
    chosen += random.Random(len(found)).sample(found, FEW_POINTS - len(chosen))
    before = "absent" if stage.old_model is None else "old"
    assert die_at(stage, chosen) == {before, "new"}


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_run_that_dies_at_any_system_call_leaves_the_old_state_or_the_new_one(stage: Stage) -> None:
    found = every_point(stage)
    print(f"{len(found)} points")
    before = "absent" if stage.old_model is None else "old"
    assert die_at(stage, found) == {before, "new"}


def test_a_run_that_dies_at_any_time_leaves_the_old_state_or_the_new_one(stage: Stage) -> None:
    die_at_random_times(stage, RANDOM_TIMES if os.environ.get("CI") else RANDOM_TIMES // 4, random.Random(3))


def test_a_loss_of_power_at_any_moment_leaves_the_old_state_or_the_new_one(stage: Stage) -> None:
    """Every state that the disk can be in when all that is not synced is lost; the catalog is lost with it."""
    stage.prepare()
    disk = power_loss.Disk(stage.place)
    log = stage.directory / "log"
    assert stage.server.run_traced(power_loss.recording(log), *stage.command, catalog=stage.catalog) == 0
    trees: list[power_loss.Tree] = []
    for call in power_loss.read_calls(log):
        disk.apply(call)
        tree = disk.after_power_loss()
        if not trees or tree != trees[-1]:
            trees.append(tree)
    assert len(trees) > 10
    left = []
    for tree in trees:
        stage.prepare()
        shutil.rmtree(stage.place)
        power_loss.write_tree(tree, stage.place)
        left.append(stage.check())
        stage.recover()
    before = "absent" if stage.old_model is None else "old"
    assert left == [before] * left.count(before) + ["new"] * left.count("new")
    assert {before, "new"} == set(left)
