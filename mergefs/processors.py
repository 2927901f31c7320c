"""How many processors this process may keep busy."""

import math
import os
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


def usable_processors() -> int:
    """Return the number of processors to use, at least 1.

    Those that the process is bound to (``taskset``, SLURM), and no more than its container pays for (``docker --cpus``,
    limits of Kubernetes): who starts more threads than that is stopped in the middle of them.
    """
    bound = len(os.sched_getaffinity(0))
    quota = _quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _quota() -> float | None:
    """Return the processors that the container's control group allows, None where it sets no limit."""
    try:
        allowed, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # the first version of control groups
            allowed = (_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not (allowed.isdigit() and period.isdigit()) or period == "0":
        return None  # "max", or -1 in the first version
    return int(allowed) / int(period)
