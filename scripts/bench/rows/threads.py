"""What a second core brings, to a merge and to programs that share nothing."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.cold import bring_in
from bench.comparing import same_bits
from bench.processes import Limits, Taken, told
from bench.programs import analyze, materialize, materialize_cold
from bench.reading import weights
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import TINY, Setting, named

STATES = ("cold", "warm")
_HASHER = Path(__file__).parents[1] / "hashing.py"


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


def apart_name(setting: Setting) -> str:
    """Return the name of the row of programs that share nothing."""
    return f"apart@{named(setting.large)}"


def apart_on(cores: int) -> str:
    """Return the way of so many programs."""
    return f"{cores} {'program' if cores == 1 else 'programs'}"


def apart(setting: Setting) -> Row:
    """Return the row of what reads and hashes the inputs and nothing else, on one core and on two.

    A core of its own, and no lock to share: what that brings is what memory and caches that cores share leave of it.
    """

    def ways() -> tuple[Way, ...]:
        files = [
            file for expert in setting.family(setting.large, setting.extent.main).experts for file in weights(expert)
        ]
        bring_in(files)
        return tuple(Way(apart_on(cores), partial(_hash, setting, files, cores)) for cores in (1, 2))

    return Row(apart_name(setting), ways)


def _hash(setting: Setting, files: list[Path], cores: int) -> Taken:
    """Read and hash files in so many programs; the seconds are without their start."""
    limits = Limits(processors=setting.processors(cores))
    return told([sys.executable, _HASHER, str(cores), *files], setting.variables(), limits)
