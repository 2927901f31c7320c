"""The part of the page that sets mergefs beside mergekit and plain copying."""

from collections.abc import Iterator

from bench.markdown import Target, at_least, at_most, median_of, memory, ratio, seconds, table, times
from bench.programs import MERGEKIT_OPTIONS, SAME_OPTIONS
from bench.recipes import METHODS
from bench.results import Results
from bench.rows.catalogue import counts_of
from bench.rows.peers import COLD, COPYING, MERGEKIT, WARM, name_of, start_of
from bench.setting import Setting, named

_COLUMNS = (
    "method",
    "experts",
    "mergekit",
    "mergefs cold",
    "mergefs warm",
    "copying",
    "cold is faster by",
    "warm is faster by",
    "cold, end to end",
    "warm, end to end",
    "warm to copying",
)


_LEAST = 0.2
"""Of the start: what is less beyond it is lost in how the start varies."""


def net(results: Results, method: str, row: str, way: str) -> float | None:
    """Return the median of a way with the start of its program taken off.

    None where one of them was not measured, or where next to nothing is left.
    """
    whole, start = results.median(row, way), results.median(start_of(method), way)
    return None if whole is None or start is None or whole - start < _LEAST * start else whole - start


def section(setting: Setting, results: Results) -> str:
    """Return the tables of all methods, for each size."""
    parts = ["## Beside mergekit and plain copying\n", _introduction(setting), _starts(results)]
    for size in dict.fromkeys((setting.large, setting.small)):
        found = list(_measured(setting, results, size))
        if found:
            parts += [f"### Models of {named(size)}\n", _times(results, found), _memory(results, found)]
            parts += [f"What they wrote:\n\n{_checks(results, found)}"]
    return "\n".join(parts)


def _measured(setting: Setting, results: Results, size: int) -> Iterator[tuple[str, int, str]]:
    """Yield method, number of experts and name of each row that has been measured; only those whose outputs agree."""
    for method in METHODS.values():
        for count in sorted({*counts_of(setting, method), setting.extent.main}):
            name = name_of(method.name, count, size)
            if results.checked(name) is not None:
                yield method.name, count, name


def _introduction(setting: Setting) -> str:
    options = " ".join((*SAME_OPTIONS, *MERGEKIT_OPTIONS, f"--num-threads {setting.threads}"))
    return (
        "Median seconds of the whole command, with the number of runs in brackets; the ways took turns. *cold* is "
        "`mergefs materialize` with a new catalog, *warm* with one that `mergefs analyze` has filled; reads are "
        "verified and what is written is synced, as by default. mergekit syncs nothing. *copying* reads the same "
        "inputs with `cat` and writes as many bytes with `dd` and the same syncs. Files are in the page cache, as "
        "plain reading leaves them. "
        "*faster by* compares without the start of each program, *end to end* with it; a dash stands where what is "
        "left of either is less than a fifth of its start, which varies by as much.\n\n"
        f"mergekit runs as `mergekit-yaml RECIPE OUT {options}`, without a network.\n"
    )


def _starts(results: Results) -> str:
    """Return how long each program takes for models of a megabyte."""
    rows = []
    for method in METHODS:
        values = [results.median(start_of(method), way) for way in (MERGEKIT, COLD, WARM)]
        if all(value is not None for value in values):
            rows.append([f"`{method}`", *map(seconds, values)])
    columns = ("start: a merge of models of 1 MiB", "mergekit", "mergefs cold", "mergefs warm")
    return table(columns, rows) if rows else ""


def _times(results: Results, found: list[tuple[str, int, str]]) -> str:
    rows = []
    for method, count, name in found:
        checked = results.checked(name)
        if checked is None or not checked.same:
            rows.append([f"`{method}`", str(count), *["the outputs differ: no comparison"], *["-"] * 8])
            continue
        medians = {way: results.median(name, way) for way in (MERGEKIT, COLD, WARM, COPYING)}
        nets = {way: net(results, method, name, way) for way in (MERGEKIT, COLD, WARM)}
        rows.append(
            [
                f"`{method}`",
                str(count),
                *(median_of(results.taken(name, way), value) for way, value in medians.items()),
                times(ratio(nets[MERGEKIT], nets[COLD])),
                times(ratio(nets[MERGEKIT], nets[WARM])),
                times(ratio(medians[MERGEKIT], medians[COLD])),
                times(ratio(medians[MERGEKIT], medians[WARM])),
                times(ratio(nets[WARM], medians[COPYING])),
            ]
        )
    return table(_COLUMNS, rows)


def _memory(results: Results, found: list[tuple[str, int, str]]) -> str:
    columns = ("most memory resident", "experts", "mergekit", "mergefs cold", "mergefs warm")
    rows = [
        [f"`{method}`", str(count), *(memory(results.peak(name, way)) for way in (MERGEKIT, COLD, WARM))]
        for method, count, name in found
    ]
    return table(columns, rows)


def _checks(results: Results, found: list[tuple[str, int, str]]) -> str:
    """Return what the comparison of outputs found, one item for each row."""
    checks = ((method, count, results.checked(name)) for method, count, name in found)
    return "".join(
        f"* `{method}` of {count}: {'' if checked.same else '**not the same**: '}{checked.found}\n"
        for method, count, checked in checks
        if checked is not None
    )


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return what is aimed at beside mergekit, and beside copying."""
    main, size = setting.extent.main, named(setting.large)
    ties, linear = (name_of(method, main, setting.large) for method in ("ties", "linear"))
    small = name_of("ties", main, setting.small)

    def faster(method: str, row: str, way: str) -> float | None:
        if not _agrees(results, row):
            return None
        return ratio(net(results, method, row, MERGEKIT), net(results, method, row, way))

    def to_copying(method: str, row: str) -> float | None:
        return ratio(net(results, method, row, WARM), results.median(row, COPYING)) if _agrees(results, row) else None

    whole = ratio(results.median(small, MERGEKIT), results.median(small, COLD)) if _agrees(results, small) else None
    return [
        at_least(f"TIES, {main} experts, {size}: cold at least 25x mergekit", faster("ties", ties, COLD), 25),
        at_least(f"TIES, {main} experts, {size}: warm at least 50x mergekit", faster("ties", ties, WARM), 50),
        at_least(f"TIES, {main} experts, {named(setting.small)}: cold, end to end, at least 10x", whole, 10),
        at_least(f"linear, {main} experts, {size}: cold at least 5x mergekit", faster("linear", linear, COLD), 5),
        at_least(f"linear, {main} experts, {size}: warm at least 5x mergekit", faster("linear", linear, WARM), 5),
        _never_slower(setting, results),
        at_most(f"linear, {main} experts, {size}: warm at most 1.5x copying", to_copying("linear", linear), 1.5),
        at_most(f"TIES, {main} experts, {size}: warm at most 2.5x copying", to_copying("ties", ties), 2.5),
    ]


def _agrees(results: Results, row: str) -> bool:
    checked = results.checked(row)
    return checked is not None and checked.same


def _never_slower(setting: Setting, results: Results) -> Target:
    """Return the target of all methods with all numbers of experts: the smallest advantage, end to end and cold."""
    found = []
    for size in (setting.large, setting.small):
        for method, count, name in _measured(setting, results, size):
            value = ratio(results.median(name, MERGEKIT), results.median(name, COLD))
            if value is not None and _agrees(results, name):
                found.append((value, f"{method} of {count} at {named(size)}"))
    claim = "every method with every number of experts: at least as fast as mergekit, cold, end to end"
    if not found:
        return Target(claim, "-", None)
    least, where = min(found)
    return Target(claim, f"{times(least)} at least ({where}), of {len(found)} merges", least >= 1)
