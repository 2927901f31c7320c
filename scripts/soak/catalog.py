"""Eight processes that analyze, plan, mount and materialize against one catalog at once for a minute, some killed.

usage: scripts/soak/catalog.py [SECONDS]
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from catalog_soak import soak


def main() -> int:
    """Run, print the figures, and exit with 1 when anything was wrong."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with tempfile.TemporaryDirectory(prefix="mergefs-soak-") as directory:
        figures = soak(Path(directory), seconds, processes=8, seed=1)
    print(json.dumps(figures, indent=2))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
