"""All rows, the most important first, so that a run that is stopped early has measured what matters most."""

from fnmatch import fnmatch

from bench.recipes import METHODS, Method
from bench.rounds import Row
from bench.rows import budgets, disk, mounts, peers, threads, variants
from bench.setting import Setting


def all_rows(setting: Setting) -> list[Row]:
    """Return every row, in the order in which they are measured."""
    main, large, small = setting.extent.main, setting.large, setting.small
    rows = [disk.plain(setting)]
    for method in ("ties", "linear"):
        rows += [peers.starting(setting, method), peers.merging(setting, method, main, large)]
    rows += [
        peers.merging(setting, "ties", main, small),
        budgets.spending(setting, slow=True),
        mounts.mounting(setting, setting.extent.few[0]),
        variants.varying(setting),
        *(threads.threading(setting, method) for method in setting.extent.few),
        threads.apart(setting),
        budgets.growing(setting),
        *(mounts.mounting(setting, method) for method in setting.extent.few),
        budgets.spending(setting, slow=False),
    ]
    methods = [METHODS[name] for name in setting.extent.methods]
    rows += [peers.starting(setting, method.name) for method in methods]
    for size in (small, large):
        for method in methods:
            rows += [peers.merging(setting, method.name, count, size) for count in counts_of(setting, method)]
    return _first_of_each(rows)


def _first_of_each(rows: list[Row]) -> list[Row]:
    """Return rows without those that have come before."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.name, row)
    return list(found.values())


def counts_of(setting: Setting, method: Method) -> list[int]:
    """Return the numbers of experts that a method is measured with."""
    return [count for count in setting.extent.counts if count in method.counts]


def chosen(rows: list[Row], patterns: str) -> list[Row]:
    """Return the rows whose names match one of the patterns, which commas separate; all where there are none."""
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    return [row for row in rows if not wanted or any(fnmatch(row.name, pattern) for pattern in wanted)]
