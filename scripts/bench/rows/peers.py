"""mergefs beside mergekit and plain copying: the same recipe, the same inputs, one output each."""

from bench.cold import bring_in
from bench.comparing import same_bits, same_merge
from bench.programs import analyze, copying, materialize, materialize_cold, mergekit
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import TINY, Setting, named

MERGEKIT = "mergekit"
COLD = "mergefs cold"
WARM = "mergefs warm"
COPYING = "copying"


def name_of(method: str, experts: int, size: int) -> str:
    """Return the name of a row."""
    return f"{method}-k{experts}@{named(size)}"


def merging(setting: Setting, method: str, experts: int, size: int) -> Row:
    """Return the row of one method: mergekit, mergefs with a new catalog and with one that knows the models, copying.

    Files are in the page cache. Kernels have been compiled, as they are after the first merge on a machine.
    """
    name = name_of(method, experts, size)
    place = setting.work / "scratch" / name
    outputs = {way: place / way.replace(" ", "-") for way in (MERGEKIT, COLD, WARM, COPYING)}

    def ways() -> tuple[Way, ...]:
        family = setting.family(size, experts)
        recipe = setting.recipe(method, family)
        setting.scratch(name)
        tiny = setting.recipe(method, setting.family(TINY, experts))
        materialize_cold(setting, [tiny], place / "tiny", place / "tiny-catalog")
        analyze(setting, recipe, place / "warm-catalog")
        bring_in(family.weights())
        inputs = family.experts if method in ("linear", "slerp") else (family.base, *family.experts)
        copied, *read = inputs
        return (
            Way(MERGEKIT, lambda: mergekit(setting, recipe, outputs[MERGEKIT]), outputs[MERGEKIT]),
            Way(
                COLD,
                lambda: materialize_cold(setting, [recipe], outputs[COLD], place / "cold-catalog"),
                outputs[COLD],
            ),
            Way(WARM, lambda: materialize(setting, [recipe], outputs[WARM], place / "warm-catalog"), outputs[WARM]),
            Way(COPYING, lambda: copying(setting, read, copied, outputs[COPYING]), outputs[COPYING]),
        )

    def check() -> Checked:
        own = same_bits(outputs[COLD], outputs[WARM])
        if not own.same:
            return own
        return same_merge(method, setting.family(size, experts), outputs[WARM], outputs[MERGEKIT])

    return Row(name, ways, check)


def starting(setting: Setting, method: str) -> Row:
    """Return the row of a merge that is all start: of models of a megabyte."""
    name = start_of(method)
    place = setting.work / "scratch" / name
    out = {way: place / way.replace(" ", "-") for way in (MERGEKIT, COLD, WARM)}

    def ways() -> tuple[Way, ...]:
        recipe = setting.recipe(method, setting.family(TINY, 2))
        setting.scratch(name)
        analyze(setting, recipe, place / "catalog")
        materialize(setting, [recipe], place / "first", place / "catalog")
        return (
            Way(MERGEKIT, lambda: mergekit(setting, recipe, out[MERGEKIT]), out[MERGEKIT]),
            Way(COLD, lambda: materialize_cold(setting, [recipe], out[COLD], place / "cold"), out[COLD]),
            Way(WARM, lambda: materialize(setting, [recipe], out[WARM], place / "catalog"), out[WARM]),
        )

    return Row(name, ways, lambda: same_merge(method, setting.family(TINY, 2), out[WARM], out[MERGEKIT]))


def start_of(method: str) -> str:
    """Return the name of the row of a method's start."""
    return f"start-{method}"
