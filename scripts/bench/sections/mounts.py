"""The part of the page about reading mounts."""

from bench.markdown import Target, median_of, memory, rate, table
from bench.reading import PIECE, SHARE
from bench.results import Results
from bench.rows.mounts import ENGINE, FILE_COLD, PATTERNS, again, file, first, mount_name
from bench.setting import Setting, named
from mergefs.units import format_size

_OF_THE_ENGINE = 0.8
_ENOUGH = 1e9
_OF_THE_FILE = 0.75


def section(setting: Setting, results: Results) -> str:
    """Return the tables of reads."""
    parts = [
        "## Reading a mount\n",
        f"Models of {named(setting.large)}, {setting.extent.main} experts, which the catalog knows and the page cache "
        "holds. *sequential* reads all files from beginning to end in pieces of 1 MiB, *random* one byte in "
        f"{SHARE} in pieces of {format_size(PIECE)}, *mmap* touches every page of all files in order. *again* is a "
        "second reading of the same mount. *engine* computes the same bytes in one process without a mount.\n",
    ]
    for method in setting.extent.few:
        name = mount_name(setting, method)
        if results.median(name, ENGINE) is not None:
            checked = results.checked(name)
            if checked is not None and not checked.same:
                parts.append(f"`{method}`: **no comparison**: {checked.found}\n")
                continue
            parts += [_table(method, results, name), f"{checked.found if checked else ''}\n"]
    return "\n".join(parts) if len(parts) > 2 else ""


def _table(method: str, results: Results, name: str) -> str:
    ways = [ENGINE, *(way(pattern) for pattern in PATTERNS for way in (first, again, file)), FILE_COLD]
    rows = []
    for way in ways:
        value, taken = results.median(name, way), results.taken(name, way)
        if value is not None:
            gigabytes = _speed(results, name, way)
            rows.append([way, median_of(taken, value), rate(gigabytes or 0.0, 1.0), memory(results.peak(name, way))])
    return table((f"`{method}`", "seconds", "GB/s", "most memory of the server, or the reader"), rows)


def _speed(results: Results, name: str, way: str) -> float | None:
    """Return the bytes for each second that a way read, None where it was not measured."""
    value, taken = results.median(name, way), results.taken(name, way)
    return taken[0].facts["bytes"] / value if value else None


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return what is aimed at when mounts are read."""
    found = []
    for method in setting.extent.few[:1]:
        name = mount_name(setting, method)
        checked = results.checked(name)
        agrees = checked is None or checked.same
        speeds = {
            way: _speed(results, name, way) if agrees else None
            for way in (ENGINE, first("sequential"), again("sequential"), file("sequential"))
        }
        found += [
            _target(
                f"{method.upper()}: a sequential read of a mount reaches 80 % of the engine's rate, or 1 GB/s",
                speeds[first("sequential")],
                None if speeds[ENGINE] is None else min(_OF_THE_ENGINE * speeds[ENGINE], _ENOUGH),
            ),
            _target(
                f"{method.upper()}: a second read at least 0.75 of a plain file's rate",
                speeds[again("sequential")],
                None if speeds[file("sequential")] is None else _OF_THE_FILE * speeds[file("sequential")],
            ),
        ]
    return found


def _target(claim: str, reached: float | None, wanted: float | None) -> Target:
    if reached is None or wanted is None:
        return Target(claim, "-", None)
    return Target(claim, f"{reached / 1e9:.2f} GB/s, wanted {wanted / 1e9:.2f}", reached >= wanted)
