"""How many processors are used: those that there are, bound, and paid for."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from mergefs import processors
from mergefs.processors import usable_processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu.max": "what is this\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "0\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, 8),
    ],
)
def test_a_container_uses_what_it_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], expected: int
) -> None:
    monkeypatch.setattr(processors, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_processors() == expected


def test_a_bound_process_uses_what_it_is_bound_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processors, "_CGROUP", tmp_path)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_processors() == len(allowed)
