"""A run that dies at any system call, at any time, or with the power leaves the old model or the new one."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import power_loss
import pytest
import torch
from checkpoints import Family, family
from crashes import CommandServer, Point, command_server, counting, points
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.verify import verify

RANDOM_TIMES = 20
FEW_POINTS = 12


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a model is written that may die: over an old model, or where nothing is."""

    server: CommandServer
    directory: Path
    catalogs: Path
    recipe: Path
    old_model: Path | None
    expected: str

    @property
    def place(self) -> Path:
        """The directory above the destination; nothing else may stay in it."""
        return self.directory / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def catalog(self) -> Path:
        return self.catalogs / "catalog"

    @property
    def command(self) -> tuple[str | Path, ...]:
        return ("materialize", "--resume", "--overwrite", self.recipe, self.out)

    def prepare(self) -> None:
        """Bring back the old state, with a catalog that knows the hashes of the inputs."""
        for path in (self.place, self.catalog):
            shutil.rmtree(path, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.catalogs / "known", self.catalog)
        if self.old_model is not None:
            shutil.copytree(self.old_model, self.out)

    def check(self) -> str:
        """Assert that the destination is absent, old or new, and sound; return which."""
        if not self.out.exists():
            assert self.old_model is None
            return "absent"
        found = verify(self.out).manifest
        assert found in ([] if self.old_model is None else [manifest_hash(self.old_model)]) + [self.expected]
        return "new" if found == self.expected else "old"

    def recover(self) -> None:
        """Run the command again, and assert that all is as it should be in the end."""
        self.server.run(*self.command, catalog=self.catalog)
        assert verify(self.out).manifest == self.expected
        assert [path.name for path in self.place.iterdir()] == ["out"]
        with Catalog(self.catalog) as catalog:
            assert {one.state for one in catalog.transactions()} <= {"committed", "aborted"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of two files of three pieces together."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1, hidden=128, layers=1, vocabulary=4500
    )


@pytest.fixture(scope="module")
def stages(models: Family, catalogs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    """The same with nothing at the destination, and with another model there."""
    directory, known = tmp_path_factory.mktemp("stage"), catalogs / "crashes" / "known"
    recipe = write_recipe(directory / "recipe.yml", MERGES["task_arithmetic"], models)
    other = write_recipe(directory / "other.yml", MERGES["linear without a base"], models)
    with command_server(directory, "materialize", recipe, directory / "expected", catalog=known) as server:
        server.run("materialize", other, directory / "old", catalog=known)
        expected = manifest_hash(directory / "expected")
        assert expected is not None
        yield {
            name: Stage(server, directory, known.parent, recipe, old, expected)
            for name, old in (("absent", None), ("replaced", directory / "old"))
        }


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


def die_at_random_times(stage: Stage, times: int, chance: random.Random) -> dict[str, int]:
    """Kill the command at random times, and recover; return how often which state was left."""
    left = {"absent": 0, "old": 0, "new": 0}
    longest = 0.4
    for _ in range(times):
        stage.prepare()
        stage.server.run_and_kill(chance.uniform(0, longest), *stage.command, catalog=stage.catalog)
        left[stage.check()] += 1
        stage.recover()
    return left


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
