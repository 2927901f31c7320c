"""What a budget saves: the same merge of many experts with less and less of them read, from a slow source."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from bench.cold import evict, limits_or_free, throttled
from bench.comparing import same_bits
from bench.families import Family
from bench.processes import Taken
from bench.programs import analyze, materialize, materialize_cold
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import TINY, Setting, named

METHOD = "ties"


def budgets_name(setting: Setting, slow: bool) -> str:
    """Return the name of the row of all budgets; ``slow`` limits what the disk gives."""
    return f"budgets{'' if slow else '-disk'}-{METHOD}-k{setting.extent.budgeted}@{named(setting.large)}"


def inputs_name(setting: Setting) -> str:
    """Return the name of the row of more and more experts under one budget."""
    return f"inputs-{METHOD}@{named(setting.large)}"


def fixed_budget(setting: Setting) -> int:
    """Return the bytes that may be read of however many experts: half of one."""
    return setting.large // 2


def spending(setting: Setting, slow: bool) -> Row:
    """Return the row of all budgets: the catalog knows the models, and nothing of them is in the page cache."""
    name = budgets_name(setting, slow)
    place = setting.work / "scratch" / name
    count = setting.extent.budgeted

    def ways() -> tuple[Way, ...]:
        family = setting.family(setting.large, count)
        recipe = setting.recipe(METHOD, family)
        setting.scratch(name)
        _load_kernels(setting, count, place)
        analyze(setting, recipe, place / "catalog")
        return tuple(
            _way(setting, family, recipe, f"{budget} %", f"{budget}%", place, slow) for budget in setting.extent.budgets
        )

    def check() -> Checked:
        recipe = setting.recipe(METHOD, setting.family(setting.large, count))
        materialize(setting, [recipe], place / "unbudgeted", place / "catalog")
        found = same_bits(place / "100--%", place / "unbudgeted")
        return Checked(found.same, f"100 % and no budget: {found.found}")

    return Row(name, ways, check)


def growing(setting: Setting) -> Row:
    """Return the row of more and more experts under one budget in bytes."""
    name = inputs_name(setting)
    place = setting.work / "scratch" / name
    budget = str(fixed_budget(setting))

    def ways() -> tuple[Way, ...]:
        setting.scratch(name)
        whole = setting.family(setting.large, max(setting.extent.sweep))
        analyze(setting, setting.recipe(METHOD, whole), place / "catalog")
        found = []
        for count in setting.extent.sweep:
            _load_kernels(setting, count, place)
            family = whole.first(count)
            recipe = setting.recipe(METHOD, family)
            found.append(_way(setting, family, recipe, f"{count} experts", budget, place, True))
        return tuple(found)

    return Row(name, ways)


def _load_kernels(setting: Setting, count: int, place: Path) -> None:
    """Let kernels be compiled before they are needed."""
    tiny = setting.recipe(METHOD, setting.family(TINY, count))
    materialize_cold(setting, [tiny], place / f"tiny-{count}", place / "tiny-catalog", ("--budget", "50%"))


def _way(setting: Setting, family: Family, recipe: Path, name: str, budget: str, place: Path, slow: bool) -> Way:
    """Return the way of one budget."""
    out = place / name.replace(" ", "--")

    def run() -> Taken:
        evict(family.weights())
        with throttled(setting.work) if slow else nullcontext() as limits:
            options: Sequence[str] = ("--budget", budget)
            return materialize(setting, [recipe], out, place / "catalog", options, limits_or_free(limits))

    return Way(name, run, out)
