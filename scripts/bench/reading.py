"""Reads a model's files in one of some patterns and prints how long that took; a program of its own.

usage: python reading.py PATTERN PLACE, where PLACE is a directory, or a recipe for the pattern ``engine``.
"""

import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

CHUNK = 2**20
PIECE = 64 * 2**10
"""Bytes of one read at random: a few rows of a large matrix."""

SHARE = 8
"""At random, one in so many bytes is read."""


def weights(directory: Path) -> list[Path]:
    """Return the files of weights, which are looked up before any time is taken."""
    return sorted(directory.glob("*.safetensors"))


def sequential(directory: Path) -> int:
    """Read all files from beginning to end."""
    buffer = bytearray(CHUNK)
    total = 0
    for path in weights(directory):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def at_random(directory: Path) -> int:
    """Read pieces at random places, the same in every run."""
    draw = random.Random(1)
    total = 0
    for path in weights(directory):
        size = path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for _ in range(max(1, size // (SHARE * PIECE))):
                total += len(os.pread(descriptor, PIECE, draw.randrange(0, max(1, size - PIECE))))
        finally:
            os.close(descriptor)
    return total


def mapped(directory: Path) -> int:
    """Map all files and touch every page, in order."""
    import numpy as np

    total = 0
    for path in weights(directory):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            view = np.frombuffer(pages, dtype=np.uint8)
            int(view[:: mmap.PAGESIZE].sum())
            total += len(view)
            del view
    return total


def engine(recipe: Path) -> int:
    """Compute all files in order, without a mount, as the mount's server does."""
    files = _files_of(recipe)
    total = 0
    for name in sorted(name for name in files.sizes if files.is_merged(name)):
        for offset in range(0, files.sizes[name], CHUNK):
            total += len(files.read(name, offset, min(CHUNK, files.sizes[name] - offset)))
    return total


_opened = {}


def _files_of(recipe: Path):  # type: ignore[no-untyped-def]
    """Return the files of a merge; the second time, those that have been made."""
    if recipe not in _opened:
        from mergefs.catalog import Catalog, default_location
        from mergefs.engine.model_files import ModelFiles
        from mergefs.engine.workspace import Workspace
        from mergefs.planner.build import PlanOptions, make_plan
        from mergefs.recipe.model import load_recipe

        workspace = Workspace.create(Catalog(default_location()))
        files = ModelFiles(make_plan(load_recipe(recipe), PlanOptions(), workspace), workspace, strict=False)
        files.engine.prepare()
        _opened[recipe] = files
    return _opened[recipe]


PATTERNS: dict[str, Callable[[Path], int]] = {
    "sequential": sequential,
    "random": at_random,
    "mmap": mapped,
    "engine": engine,
}


def main() -> None:
    """Read, and print seconds and bytes as JSON."""
    pattern, place = sys.argv[1], Path(sys.argv[2])
    if pattern == "engine":
        _files_of(place)
    elif pattern == "mmap":
        import numpy  # noqa: F401 - loaded before any time is taken
    started = time.perf_counter()
    total = PATTERNS[pattern](place)
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": total}))


if __name__ == "__main__":
    main()
