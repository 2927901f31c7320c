#!/usr/bin/env python3
"""Benchmarks of mergefs: each command measures one promise; ``compare`` writes docs/benchmarks.md.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/bench.py compare --work DIR``.
"""

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench.commands import bench  # noqa: E402 - after the path that it is on

if __name__ == "__main__":
    bench()
