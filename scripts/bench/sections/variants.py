"""The part of the page about several variants in one command."""

from bench.markdown import Target, at_most, median_of, memory, ratio, table
from bench.results import Results
from bench.rows.peers import COLD, WARM, start_of
from bench.rows.variants import METHOD, WRITES, many, one, variants_name
from bench.setting import Setting, named


def section(setting: Setting, results: Results) -> str:
    """Return the table of variants."""
    name = variants_name(setting)
    if results.median(name, many("cold")) is None:
        return ""
    checked = results.checked(name)
    if checked is not None and not checked.same:
        return f"## Several variants\n\n**no comparison**: {checked.found}\n"
    ways = [way(state) for state in ("cold", "warm") for way in (one, many)]
    rows = [
        [way, median_of(results.taken(name, way), results.median(name, way)), memory(results.peak(name, way))]
        for way in (*ways, WRITES)
    ]
    return (
        f"## Several variants\n\n`mergefs materialize` writes {setting.extent.variants} variants of `{METHOD}` with "
        f"{setting.extent.main} experts, models of {named(setting.large)}, in one command; *{WRITES}* copies a file "
        "that is in the page cache as often, with the same syncs.\n\n"
        + table(("variants", "seconds", "most memory"), rows)
        + ("" if checked is None else f"\n{checked.found}\n")
    )


def targets(setting: Setting, results: Results) -> list[Target]:
    """Return what is aimed at when variants share their reads."""
    name, count = variants_name(setting), setting.extent.variants
    checked = results.checked(name)
    if checked is not None and not checked.same:
        return [Target(f"{count} variants by shared scan", "the outputs differ", False)]
    found = []
    for state, way in (("cold", COLD), ("warm", WARM)):
        alone, writes = _net(results, name, one(state), way), results.median(name, WRITES)
        together = _net(results, name, many(state), way)
        least = None if alone is None or writes is None else alone + writes
        found.append(
            at_most(
                f"{count} variants, {state}: at most 1.3x one and {count - 1} plain writes", ratio(together, least), 1.3
            )
        )
        if state == "cold":
            found.append(at_most(f"{count} variants of TIES, cold: at most 4x one", ratio(together, alone), 4))
    return found


def _net(results: Results, name: str, way: str, start: str) -> float | None:
    """Return a median without the start of the program."""
    whole, begin = results.median(name, way), results.median(start_of(METHOD), start)
    return None if whole is None or begin is None or whole <= begin else whole - begin
