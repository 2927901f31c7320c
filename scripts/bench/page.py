"""Writes what has been measured into docs/benchmarks.md, between two marks; the rest of the page is written by hand."""

from pathlib import Path
from typing import Final

from bench.figures import draw_all
from bench.machine import described
from bench.markdown import Target, rate, table
from bench.results import Results
from bench.rows.disk import CACHED, READ, WRITE, disk_name
from bench.sections import budgets, footprint, mounts, peers, threads, variants
from bench.setting import Setting
from mergefs.errors import MergefsError

BEGIN: Final = "<!-- measured by scripts/bench.py compare: begin -->"
END: Final = "<!-- measured by scripts/bench.py compare: end -->"

_SECTIONS: Final = (peers, budgets, mounts, variants, threads, footprint)
_SHOWN: Final = {
    "peers": "Seconds of mergekit, mergefs and plain copying, for each method and number of experts",
    "budgets": "Seconds by budget",
    "mounts": "Rates of reading a mount, first and again, and the file",
}
_VERDICTS: Final = {True: "met", False: "**missed**", None: "not measured"}


def write_page(document: Path, setting: Setting, results: Results) -> None:
    """Write the measured part of a page anew. Raises MergefsError where the page has no place for it."""
    pictures = draw_all(setting, results, document.parent / "figures")
    targets = [target for section in _SECTIONS for target in section.targets(setting, results)]
    parts = [
        _machine(setting, results),
        "## What is aimed at\n",
        table(("target", "measured", ""), (_row(target) for target in targets), words=3),
        *(f"![{_SHOWN[what]}]({path})\n" for what, path in pictures.items()),
        *filter(None, (section.section(setting, results) for section in _SECTIONS)),
    ]
    text = document.read_text(encoding="utf-8") if document.exists() else f"{BEGIN}\n{END}\n"
    document.write_text(with_measured(text, "\n".join(parts)), encoding="utf-8")


def with_measured(page: str, measured: str) -> str:
    """Return ``page`` with ``measured`` between the marks; MergefsError where it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MergefsError(f"the page has no lines {BEGIN!r} and {END!r}; put them where the tables are to stand")
    return f"{before}{BEGIN}\n\n{measured}\n{END}{after}"


def _row(target: Target) -> tuple[str, str, str]:
    return target.claim, target.measured, _VERDICTS[target.met]


def _machine(setting: Setting, results: Results) -> str:
    """Return what the machine is, and what its disk gives, as a table."""
    rows = [(name, value) for name, value in described(setting.work).items()]
    name = disk_name(setting)
    speeds = []
    for way in (WRITE, READ, CACHED):
        value, taken = results.median(name, way), results.taken(name, way)
        if value is not None:
            speeds.append(f"{way} {rate(taken[0].facts['bytes'], value)} GB/s")
    if speeds:
        rows.append(("plain copying", ", ".join(speeds)))
    return "## The machine\n\n" + table(("", ""), rows, words=2)
