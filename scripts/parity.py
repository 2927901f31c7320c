"""Compare every method with mergekit over the whole parity matrix and write docs/parity.md.

usage: .venv/bin/python scripts/parity.py [METHOD...]     (only measure these methods anew)
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

from parity_cases import DTYPES, families_below, matrix  # noqa: E402 - after the environment that it reads
from parity_matrix import Outcome, run_rows  # noqa: E402
from parity_report import DOCUMENT, render  # noqa: E402

from mergefs.methods.registry import METHODS  # noqa: E402


def main(methods: list[str]) -> int:
    """Run the matrix; return 1 where a claim does not hold."""
    logging.getLogger("mergefs").setLevel(logging.CRITICAL)  # edge values outgrow float16, and are told so
    outcomes: dict[tuple[str, str], Outcome] = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        place = Path(directory)
        os.environ["MERGEFS_CATALOG"] = str(place / "catalog")
        families = families_below(place)
        for method in methods or METHODS:
            start = time.monotonic()
            rows = matrix(method, families, place).rows
            for dtype in DTYPES:
                outcome = outcomes[method, dtype] = run_rows(method, dtype, rows, families, place)
                print(f"{method} {dtype}: {outcome.cases} cases, {outcome.fixed}, as it is {outcome.untouched}")
                print(*outcome.failures, sep="\n", end="\n" if outcome.failures else "")
            print(f"{method}: {time.monotonic() - start:.1f} s", flush=True)
    earlier = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    DOCUMENT.write_text(render(outcomes, earlier), encoding="utf-8")
    return int(any(outcome.failures for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
