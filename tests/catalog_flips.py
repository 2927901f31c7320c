"""Flips single bits of a catalog's file and says what follows. Run by test_catalog_damage.py in a process of its own.

usage: catalog_flips.py DIRECTORY FLIPS SEED

For each flip the merge is planned and computed from the damaged catalog, which is then checked and repaired, and the
merge is computed once more; each step in a forked process, since LMDB may be killed by damaged pages. Prints JSON:
how often each outcome came, and the sentences, tracebacks and wrong bytes that there were.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import family
from recipes import MERGES, write_recipe

from mergefs.api import open_model
from mergefs.catalog import Catalog, environment
from mergefs.catalog.check.evidence import Repair
from mergefs.catalog.check.run import check
from mergefs.catalog.check.supervision import check_catalog
from mergefs.errors import MergefsError

WHOLE, SENTENCE, BROKEN = 0, 1, 2
DEADLINE = 30
"""Seconds of a processor after which a process counts as one that never ends, however busy the machine is."""


def merged(recipe: Path, catalog: Path) -> str:
    """Plan the merge and return a hash of its weights."""
    with open_model(recipe, budget="50%", catalog=catalog) as model:
        return hashlib.sha256(model.read_file("model.safetensors")).hexdigest()


def in_a_process(task: Callable[[], str | None]) -> tuple[int, str]:
    """Run ``task`` in a fork; return its status (negative: the signal that killed it) and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status, said = BROKEN, ""
        signal.setitimer(signal.ITIMER_PROF, DEADLINE)
        try:
            said = task() or ""
            status = WHOLE
        except MergefsError as error:
            status, said = SENTENCE, str(error)
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode()[:60_000])
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def used_bytes(catalog: Path) -> int:
    """Return the size of the pages that are in use or have been."""
    with Catalog(catalog) as opened:
        return (int(opened._environment._lmdb.info()["last_pgno"]) + 1) * 4096


def flip(catalog: Path, position: int) -> None:
    """Flip one bit of the data."""
    with (catalog / "data.mdb").open("r+b") as file:
        file.seek(position // 8)
        byte = file.read(1)[0]
        file.seek(position // 8)
        file.write(bytes([byte ^ 1 << position % 8]))


class Flips:
    """The outcomes of many flips."""

    def __init__(self, directory: Path) -> None:
        models = family(directory / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
        self.recipe = write_recipe(directory / "ties.yml", MERGES["ties"], models)
        self.sound = directory / "sound"
        self.damaged = directory / "damaged"
        status, said = in_a_process(lambda: merged(self.recipe, self.sound))
        assert status == WHOLE, said
        self.expected = said
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self, position: int) -> None:
        """Flip one bit, use the catalog, check it, and use it once more."""
        shutil.rmtree(self.damaged, ignore_errors=True)
        shutil.copytree(self.sound, self.damaged)
        flip(self.damaged, position)
        self.note("used", position, *in_a_process(lambda: merged(self.recipe, self.damaged)))
        shutil.rmtree(self.damaged)
        shutil.copytree(self.sound, self.damaged)
        flip(self.damaged, position)
        self.check(position)
        status, said = in_a_process(lambda: merged(self.recipe, self.damaged))
        if (status, said) != (WHOLE, self.expected):
            self.failures.append(f"bit {position}: after the repair {status} {said}")

    def note(self, what: str, position: int, status: int, said: str) -> None:
        """Count one outcome; a traceback or wrong bytes are failures."""
        if status == WHOLE and said != self.expected:
            self.failures.append(f"bit {position}: wrong bytes")
        if status == BROKEN:
            self.failures.append(f"bit {position}: {said}")
        if status == -signal.SIGPROF:
            self.failures.append(f"bit {position}: never ends")
        names = {WHOLE: "right", SENTENCE: "refused", BROKEN: "traceback"}
        self.outcomes[f"{what}: {names.get(status, 'killed')}"] += 1

    def check(self, position: int) -> None:
        """Check and repair as the command does; where that can be done without another process, without one."""

        def repair() -> str:
            report = check(self.damaged, repair=True)
            return "rebuild" if any(one.repair is Repair.REBUILD for one in report.findings) else report_of(report)

        status, said = in_a_process(repair)
        if status == BROKEN:
            self.failures.append(f"bit {position}: the check: {said}")
        if status != WHOLE or said == "rebuild":
            said = report_of(check_catalog(self.damaged, repair=True))
            self.outcomes["check: rebuilt"] += 1
        else:
            self.outcomes["check: repaired" if said == "repaired" else f"check: {said}"] += 1
        if said == "foreign":
            shutil.rmtree(self.damaged)  # its remedy


def report_of(report: object) -> str:
    """Return what a check came to."""
    findings, repaired = report.findings, report.repaired  # type: ignore[attr-defined]
    if findings:
        return (
            "foreign"
            if {one.number for one in findings} <= {"C1", "C2"}
            else f"left {sorted(one.number for one in findings)}"
        )
    return "repaired" if repaired else "clean"


def main() -> None:
    """Flip bits at places that follow from the seed."""
    environment._INITIAL_MAP = 512 * 2**10  # it is copied for every flip
    directory, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    flips = Flips(directory)
    size = used_bytes(flips.sound) * 8
    chance = random.Random(seed)
    for _ in range(count):
        flips.run(chance.randrange(size))
    print(json.dumps({"bytes": size // 8, "outcomes": flips.outcomes, "failures": flips.failures}))


if __name__ == "__main__":
    main()
