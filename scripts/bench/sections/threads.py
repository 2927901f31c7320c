"""The part of the page about a second core."""

from bench.markdown import Target, at_least, median_of, memory, ratio, table, times
from bench.results import Results
from bench.rows.peers import COLD, WARM, start_of
from bench.rows.threads import STATES, apart_name, apart_on, threads_name, way_of
from bench.setting import Setting, named

_ENOUGH = 1.6
_STARTS = {"cold": COLD, "warm": WARM}


def section(setting: Setting, results: Results) -> str:
    """Return the table of one core and two."""
    rows = []
    for method in setting.extent.few:
        name = threads_name(setting, method)
        checked = results.checked(name)
        if checked is not None and not checked.same:
            rows.append([f"`{method}`", f"**no comparison**: {checked.found}", "-", "-", "-"])
            continue
        for state in STATES:
            ways = [way_of(state, cores) for cores in (1, 2)]
            if results.median(name, ways[0]) is not None:
                medians = [median_of(results.taken(name, way), results.median(name, way)) for way in ways]
                peak = memory(max(results.peak(name, way) for way in ways))
                rows.append([f"`{method}`, {state}", *medians, times(_gain(results, method, name, state)), peak])
    if not rows:
        return ""
    columns = ("", "seconds on one core", "on two", "faster by", "most memory")
    return (
        f"## Cores\n\n`mergefs materialize`, {setting.extent.main} experts, models of {named(setting.large)}; *faster "
        f"by* compares without the start of the program.\n\n{table(columns, rows)}{_apart(setting, results)}"
    )


def _apart(setting: Setting, results: Results) -> str:
    """Return what a second core brings to programs that share nothing, where that was measured."""
    name = apart_name(setting)
    one, two = (results.median(name, apart_on(cores)) for cores in (1, 2))
    if one is None or two is None:
        return ""
    return (
        f"\n\nTwo programs that share no lock, of which each reads half of every expert from the page cache and hashes "
        f"it, take {two:.2f} s on two cores, where one on one core takes {one:.2f} s for all: {times(ratio(one, two))}."
    )


def _gain(results: Results, method: str, name: str, state: str) -> float | None:
    """Return how many times as fast two cores are, without the start of the program."""
    start = results.median(start_of(method), _STARTS[state])
    one, two = (results.median(name, way_of(state, cores)) for cores in (1, 2))
    return None if start is None or one is None or two is None else ratio(one - start, two - start)


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return what is aimed at with two cores."""
    return [
        at_least(
            f"{method}, {state}: two cores at least {_ENOUGH}x one",
            _gain(results, method, threads_name(setting, method), state),
            _ENOUGH,
        )
        for method in setting.extent.few
        for state in STATES
    ]
