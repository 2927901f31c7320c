"""Kills `mergefs materialize` at random times, over nothing and over another model, and looks at what it leaves.

usage: scripts/soak/crashes.py [TIMES]
"""

import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    """Run, and print how often which state was left; an AssertionError tells of the first that is wrong."""
    from crashes import crash_models, crash_stages, die_at_random_times

    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    chance = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="mergefs-soak-") as place:
        directory = Path(place)
        with crash_stages(crash_models(directory / "models"), directory, directory / "catalogs") as stages:
            left = {name: die_at_random_times(stage, times // 2, chance) for name, stage in stages.items()}
    print(json.dumps({"killed": times, "left": left, "recovered to the expected hash": times}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
