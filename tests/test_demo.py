"""The demo runs from training to the comparison of every file, here with models too small to learn anything."""

import os
from pathlib import Path

import pytest

from mergefs.demo.run import run_demo
from mergefs.demo.training import FamilyOptions
from mergefs.materialize.verify import verify
from mergefs.mount.mountinfo import list_mounts

TINY = FamilyOptions(
    hidden_size=32,
    layers=1,
    heads=2,
    key_value_heads=1,
    intermediate_size=64,
    context=32,
    batch=4,
    base_steps=3,
    expert_steps=2,
    precision="float32",
    max_shard_size="50KB",
)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands that the demo runs find the package of this checkout."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    )


def test_the_demo_shows_every_model_leaves_one_that_equals_its_mount_and_trains_once(
    tmp_path: Path, importable: None, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "demo"
    run_demo(directory, None, TINY)

    said, progress = capfd.readouterr()
    assert progress.count("base on all domains") == 3
    assert "equal to the mount byte for byte" in said
    assert "task arithmetic, 25 % writes" in said
    table = (directory / "table.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows[0] == "base"
    assert len([row for row in rows if row.startswith("expert-")]) == 3
    assert rows[-4:] == ["task arithmetic, 100 %", "task arithmetic, 25 %", "TIES, 100 %", "TIES, 25 %"]
    assert verify(directory / "merged").files >= 8
    assert not [entry for entry in list_mounts() if entry.mountpoint.is_relative_to(directory)]

    run_demo(directory, None, TINY)
    assert "base on all domains" not in capfd.readouterr().err
