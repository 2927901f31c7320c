"""A catalog under strain: single bits of its file flipped at random, and many processes at once of which some die."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from catalog_soak import soak
from mounting import ROOT, environment


@pytest.mark.parametrize("flips", [20, pytest.param(300, marks=[pytest.mark.heavy, pytest.mark.timeout(2400)])])
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
    assert outcomes["check: repaired"] + outcomes.get("check: rebuilt", 0) > flips / 5


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_eight_processes_of_which_some_are_killed_leave_a_catalog_that_is_whole(directory: Path) -> None:
    figures = soak(directory, seconds=20, processes=8, seed=2)
    assert figures["failures"] == []
    outcomes = figures["outcomes"]
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("killed")) > 0
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("right bytes")) > 12
