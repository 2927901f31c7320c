"""The benchmark of editing recipes that are mounted: it runs, checks what it reads, and knows its targets."""

import sys
from pathlib import Path

import pytest
from mounting import ROOT

sys.path.append(str(ROOT / "scripts"))

from bench import switching
from bench.switching import METHODS, measure_switching


def test_everything_that_a_change_can_be_is_measured_in_every_round(directory: Path) -> None:
    parameters, measurements = measure_switching(directory, 1 << 20, beside=1, repeat=1)
    assert 2 * parameters >= 1 << 20
    assert {len(measurement.seconds) for measurement in measurements} == {1}
    targets = {measurement.name: measurement.target for measurement in measurements}
    assert [name for name in targets if "first tensor is read" in name] == [
        f"{method}: edit until its first tensor is read" for method in METHODS
    ]
    assert {name: target for name, target in targets.items() if target is not None} == {
        "added recipe until its model is there": 1.0,
        "broken recipe until it says why": 1.0,
        "removed recipe until its name is gone": 1.0,
        **{f"{method}: what the edit takes more": 0.2 for method in METHODS},
    }


def test_a_mount_that_goes_on_to_give_the_old_model_is_found_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def first_only(model: Path) -> bytes:
        read.append(original(model))
        return read[0] if model.name == METHODS[0] else read[-1]

    original = switching._first_tensor
    monkeypatch.setattr(switching, "_first_tensor", first_only)
    with pytest.raises(RuntimeError, match="did not give what it says"):
        measure_switching(directory, 1 << 20, beside=0, repeat=1)
