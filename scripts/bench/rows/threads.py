"""What a second core brings."""

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.cold import bring_in
from bench.comparing import same_bits
from bench.processes import Limits, Taken
from bench.programs import analyze, materialize, materialize_cold
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import TINY, Setting, named

STATES = ("cold", "warm")


def threads_name(setting: Setting, method: str) -> str:
    """Return the name of a method's row."""
    return f"threads-{method}-k{setting.extent.main}@{named(setting.large)}"


def way_of(state: str, cores: int) -> str:
    """Return the way that has so many cores."""
    return f"{state}, {cores} {'core' if cores == 1 else 'cores'}"


def threading(setting: Setting, method: str) -> Row:
    """Return the row of a method on one and on two cores, which is all that the process may use."""
    name = threads_name(setting, method)
    place = setting.work / "scratch" / name
    outputs = {way_of(state, cores): place / f"{state}-{cores}" for state in STATES for cores in (1, 2)}

    def ways() -> tuple[Way, ...]:
        family = setting.family(setting.large, setting.extent.main)
        recipe = setting.recipe(method, family)
        setting.scratch(name)
        tiny = setting.recipe(method, setting.family(TINY, setting.extent.main))
        materialize_cold(setting, [tiny], place / "tiny", place / "tiny-catalog")
        analyze(setting, recipe, place / "warm")
        bring_in(family.weights())
        return tuple(_ways(recipe))

    def _ways(recipe: Path) -> Iterator[Way]:
        for state in STATES:
            for cores in (1, 2):
                way = way_of(state, cores)
                yield Way(way, _run(setting, recipe, outputs[way], place / state, cores), outputs[way])

    def check() -> Checked:
        first, *others = outputs.values()
        found = [same_bits(first, other) for other in others]
        return next((checked for checked in found if not checked.same), found[0])

    return Row(name, ways, check)


def _run(setting: Setting, recipe: Path, out: Path, catalog: Path, cores: int) -> Callable[[], Taken]:
    """Return what runs a merge on some cores; the name of a catalog says whether it starts empty."""
    program = materialize_cold if catalog.name == "cold" else materialize
    limits = Limits(processors=setting.processors(cores))
    return lambda: program(setting, [recipe], out, catalog, (), limits)
