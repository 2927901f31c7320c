"""How soon ``mergefs`` answers: its help, and a mount of models of any size."""

import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.processes import environment, timed
from bench.shapes import Shape
from bench.sparse import write_sparse_family


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that one thing took, several times, and the median that it should stay below (None: no target)."""

    name: str
    seconds: tuple[float, ...]
    target: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def meets_target(self) -> bool | None:
        return None if self.target is None else self.median < self.target


def measure_startup(directory: Path, shape: Shape, experts: int, repeat: int) -> tuple[int, list[Measurement]]:
    """Measure how soon a mount answers, and ``mergefs --help``; return the parameters of each model too.

    The commands take turns, so that what else the machine does meets all of them alike. The first round, which compiles
    byte code and fills the page cache, is not counted.
    """
    recipe, parameters = write_sparse_family(directory, shape, experts)
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    variables = environment(directory)
    mergefs = [sys.executable, "-m", "mergefs"]

    def mount(*options: str) -> float:
        elapsed = timed([*mergefs, "mount", *options, recipe, mountpoint], variables)
        timed([*mergefs, "umount", mountpoint], variables)
        return elapsed

    def mount_with_new_catalog() -> float:
        shutil.rmtree(directory / "catalog", ignore_errors=True)
        return mount()

    steps: dict[str, tuple[Callable[[], float], float | None]] = {
        "python -c pass": (lambda: timed([sys.executable, "-c", "pass"], variables), None),
        "mergefs --help": (lambda: timed([*mergefs, "--help"], variables), 0.15),
        "mergefs mount, first time": (mount_with_new_catalog, 1.0),
        "mergefs mount, plan known": (mount, 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, (step, _) in steps.items():
            elapsed = step()
            if turn:
                seconds[name].append(elapsed)
    return parameters, [Measurement(name, tuple(seconds[name]), target) for name, (_, target) in steps.items()]
