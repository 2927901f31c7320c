"""Single bits of a catalog's file flipped at random: never a traceback, never wrong bytes, and whole after a repair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
