"""A catalog under strain: single bits of its file flipped at random, and many processes at once of which some die."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from catalog_soak import soak
from checkpoints import family
from mounting import ROOT, environment
from recipes import MERGES, write_recipe
from sound_catalog import Hands

from mergefs.api import open_model
from mergefs.catalog.catalog import FORMAT, FORMAT_KEY
from mergefs.catalog.schema import META
from mergefs.cli import main


def drop_planes(place: Path, recipe: Path) -> None:
    """Code deltas, and delete the files that they are in: records that point to nothing are left."""
    assert main(["--catalog", str(place), "analyze", str(recipe), "--planes", "1"]) == 0
    shutil.rmtree(place / "planes")


def repair(place: Path) -> None:
    assert main(["--catalog", str(place), "catalog", "check", "--repair"]) == 0


def nothing(place: Path) -> None:
    """Do nothing: there is no remedy where none is needed."""


@pytest.mark.parametrize(
    ("damage", "says", "remedy"),
    [
        (lambda place, _: shutil.rmtree(place), None, nothing),
        (lambda place, _: (place / "data.mdb").unlink(), None, nothing),
        (lambda place, _: (place / "lock.mdb").unlink(), None, nothing),
        (drop_planes, None, nothing),
        (
            lambda place, _: os.truncate(place / "data.mdb", 20_000),
            r"data.mdb has 20000 bytes and needs \d+\); everything in it can be rebuilt: .*check --repair",
            repair,
        ),
        (
            lambda place, _: (place / "data.mdb").write_bytes(b"?" * 99_999),
            "check --repair` keeps what can still",
            repair,
        ),
        (
            lambda place, _: Hands(place).write((META, FORMAT_KEY, b"99")),
            f"has format '99' and this mergefs knows format '{FORMAT}'; .* or move it away: everything in it can be",
            shutil.rmtree,
        ),
    ],
    ids=["deleted", "without data", "without locks", "without planes", "cut off", "overwritten", "of another version"],
)
def test_a_damaged_or_deleted_catalog_says_what_to_do_and_loses_nothing(
    tmp_path: Path,
    catalogs: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], object],
    says: str | None,
    remedy: Callable[[Path], object],
) -> None:
    place = catalogs / f"{tmp_path.name}-catalog"
    models = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = write_recipe(tmp_path / "ties.yml", MERGES["ties"], models)

    def merged() -> tuple[str, bytes]:
        with open_model(recipe, budget="50%", catalog=place) as model:
            return model.files.plan.plan_id, model.read_file("model.safetensors")

    expected = merged()
    damage(place, recipe)
    if says is not None:
        assert main(["--catalog", str(place), "plan", str(recipe)]) == 1
        said = capsys.readouterr().err
        assert re.search(says, said), said
        assert said.count("\n") == 1
    remedy(place)
    assert merged() == expected


@pytest.mark.parametrize("flips", [12, pytest.param(300, marks=[pytest.mark.heavy, pytest.mark.timeout(2400)])])
def test_flipped_bits_are_told_or_without_effect_and_a_repair_makes_the_catalog_whole(
    catalogs: Path, tmp_path: Path, flips: int
) -> None:
    directory = catalogs / tmp_path.name
    directory.mkdir()
    finished = subprocess.run(
        [sys.executable, ROOT / "tests" / "catalog_flips.py", directory, str(flips), "5"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(finished.stdout)
    assert report["failures"] == []
    outcomes = report["outcomes"]
    assert sum(count for outcome, count in outcomes.items() if outcome.startswith("used")) == flips
    assert outcomes.get("check: repaired", 0) + outcomes.get("check: rebuilt", 0) > 0


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_eight_processes_of_which_some_are_killed_leave_a_catalog_that_is_whole(directory: Path) -> None:
    figures = soak(directory, seconds=20, processes=8, seed=2)
    assert figures["failures"] == []
    outcomes = figures["outcomes"]
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("killed")) > 0
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("right bytes")) > 12
