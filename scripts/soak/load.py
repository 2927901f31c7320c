"""16 processes of 4 threads that read random pages of 8 variants of one mount over a slow disk, some of them killed.

usage: scripts/soak/load.py [SECONDS]
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    """Run, print the figures, and exit with 1 when anything was wrong."""
    from mount_load import load, loaded_models

    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    with tempfile.TemporaryDirectory(prefix="mergefs-soak-") as place:
        directory = Path(place)
        with loaded_models(directory, delay=0.005) as models:
            figures = load(models, directory, seconds, readers=16, threads=4)
    print(json.dumps(asdict(figures), indent=2))
    return 1 if figures.failures else 0


if __name__ == "__main__":
    sys.exit(main())
