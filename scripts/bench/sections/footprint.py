"""The target of memory, over all runs of mergefs."""

from bench.markdown import Target
from bench.results import Results
from bench.setting import Setting
from mergefs.units import format_size

CAP = 2 * 2**30
"""What ``materialize`` may use by default."""


def section(setting: Setting, results: Results) -> str:
    """Return nothing: every table has its own column of memory."""
    return ""


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return the most memory that any run of mergefs took, against what it may take."""
    peaks = results.peaks(lambda way: not way.startswith(("mergekit", "copying", "file", "plain")))
    claim = f"the most memory of any run of mergefs stays below {format_size(CAP)}"
    if not peaks:
        return [Target(claim, "-", None)]
    (row, way), most = max(peaks.items(), key=lambda entry: entry[1])
    return [Target(claim, f"{format_size(most)} ({row}: {way})", most <= CAP)]
