"""The part of the page about budgets."""

from bench.cold import THROTTLED
from bench.markdown import Target, at_most, median_of, memory, ratio, table, times
from bench.processes import Taken
from bench.results import Results
from bench.rows.budgets import METHOD, budgets_name, fixed_budget, inputs_name
from bench.setting import Setting, named
from mergefs.units import format_size

_LIMIT = 0.35


def section(setting: Setting, results: Results) -> str:
    """Return the tables of budgets."""
    parts = ["## Budgets\n", f"`{METHOD}`, models of {named(setting.large)}, the catalog knows them.\n"]
    slow = f"nothing in the page cache, and a disk that gives {THROTTLED / 1e6:.0f} MB/s at most"
    for is_slow, how in ((True, slow), (False, "nothing in the page cache, the disk as it is")):
        name = budgets_name(setting, is_slow)
        if results.median(name, _way(100)) is not None:
            parts += [f"**{setting.extent.budgeted} experts, {how}**\n", _by_budget(setting, results, name)]
    name = inputs_name(setting)
    if results.median(name, _experts(setting.extent.sweep[0])) is not None:
        parts.append(f"**More and more experts, of which {format_size(fixed_budget(setting))} may be read; {slow}**\n")
        parts.append(_by_experts(setting, results, name))
    return "\n".join(parts) if len(parts) > 2 else ""


def _way(budget: int) -> str:
    return f"{budget} %"


def _experts(count: int) -> str:
    return f"{count} experts"


def _by_budget(setting: Setting, results: Results, name: str) -> str:
    whole = results.median(name, _way(setting.extent.budgets[0]))
    rows = []
    for budget in setting.extent.budgets:
        taken = results.taken(name, _way(budget))
        value = results.median(name, _way(budget))
        rows.append(
            [
                _way(budget),
                median_of(taken, value),
                times(ratio(value, whole)),
                *(_read(taken, kind) for kind in ("expert_bytes_read", "base_bytes_read", "analysis_bytes_read")),
                memory(results.peak(name, _way(budget))),
            ]
        )
    columns = ("budget", "seconds", "of the whole", "experts read", "base read", "analysis read", "most memory")
    checked = results.checked(name)
    return table(columns, rows) + ("" if checked is None else f"\n{checked.found}\n")


def _by_experts(setting: Setting, results: Results, name: str) -> str:
    rows = []
    for count in setting.extent.sweep:
        taken = results.taken(name, _experts(count))
        value = results.median(name, _experts(count))
        first = results.median(name, _experts(setting.extent.sweep[0]))
        rows.append(
            [
                str(count),
                median_of(taken, value),
                times(ratio(value, first)),
                _read(taken, "expert_bytes_read"),
                memory(results.peak(name, _experts(count))),
            ]
        )
    return table(("experts", "seconds", "of the fewest", "experts read", "most memory"), rows, words=0)


def _read(taken: list[Taken], kind: str) -> str:
    """Return what was read, which is the same in each round."""
    return format_size(int(taken[-1].facts[kind])) if taken and kind in taken[-1].facts else "-"


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return what is aimed at under budgets."""
    name = budgets_name(setting, slow=True)
    share = ratio(results.median(name, _way(10)), results.median(name, _way(100)))
    sweep = inputs_name(setting)
    most, fewest = max(setting.extent.sweep), min(setting.extent.sweep)
    growth = ratio(results.median(sweep, _experts(most)), results.median(sweep, _experts(fewest)))
    return [
        at_most(
            f"{METHOD.upper()}, {setting.extent.budgeted} experts, a budget of 10 %, a source of "
            f"{THROTTLED / 1e6:.0f} MB/s: at most {_LIMIT} of the time of 100 %",
            share,
            _LIMIT,
        ),
        Target(
            f"one budget in bytes: flat from {fewest} to {most} experts",
            times(growth),
            None if growth is None else growth < 1.5,
        ),
    ]
