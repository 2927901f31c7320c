"""Runs code in a process of its own, with compiled kernels of its own."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run_python(code: str, cache: Path, **variables: str) -> str:
    """Run ``code`` in a process of its own that keeps compiled kernels in ``cache``; return what it prints."""
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, "MERGEFS_KERNELS": str(cache), "PYTHONPATH": path, **variables}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
