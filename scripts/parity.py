"""Compare every method with mergekit over the whole parity matrix and write docs/parity.md.

usage: .venv/bin/python scripts/parity.py [METHOD...]     (only measure these methods anew)
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

from parity_cases import DTYPES, families_below, matrix  # noqa: E402 - after the environment that it reads
from parity_comparison import NOTHING, Difference  # noqa: E402
from parity_matrix import Outcome, run_rows  # noqa: E402
from parity_report import DOCUMENT, render  # noqa: E402
from parity_structures import STRUCTURES, compare, worlds_below  # noqa: E402
from tokenizers_recipes import build_in_this_process  # noqa: E402

from mergefs.methods.registry import METHODS  # noqa: E402
from mergefs.tokenizer import service  # noqa: E402


def run_matrix(methods: Iterable[str], directory: Path) -> dict[tuple[str, str], Outcome]:
    """Run the whole matrix of some methods, and tell what was found."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    families = families_below(directory)
    for method in methods:
        start = time.monotonic()
        rows = matrix(method, families, directory).rows
        for dtype in DTYPES:
            outcome = outcomes[method, dtype] = run_rows(method, dtype, rows, families, directory)
            print(f"{method} {dtype}: {outcome.cases} cases, {outcome.fixed}, as it is {outcome.untouched}")
            print(*outcome.failures, sep="\n", end="\n" if outcome.failures else "")
        print(f"{method}: {time.monotonic() - start:.1f} s", flush=True)
    return outcomes


def run_forms(directory: Path) -> dict[str, Difference]:
    """Run every method in every form of a recipe."""
    worlds = worlds_below(directory)
    found: dict[str, Difference] = {}
    for form in STRUCTURES:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            compared = [compare(form, method, worlds(dtype), directory) for dtype in DTYPES for method in METHODS]
        found[form] = sum(compared, NOTHING)
        print(f"{form}: {found[form]}", flush=True)
    return found


def main(methods: list[str]) -> int:
    """Run the matrix; return 1 where a claim does not hold."""
    logging.getLogger("mergefs").setLevel(logging.CRITICAL)  # edge values outgrow float16, and are told so
    service.run_builder = build_in_this_process
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        os.environ["MERGEFS_CATALOG"] = str(Path(directory) / "catalog")
        outcomes = run_matrix(methods or METHODS, Path(directory))
        forms = {} if methods else run_forms(Path(directory))
    earlier = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    DOCUMENT.write_text(render(outcomes, forms, earlier), encoding="utf-8")
    differing = any(found.differing for found in forms.values())
    return int(differing or any(outcome.failures for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
