"""Many variants of one recipe: written in one command, which reads each block of the sources once."""

import shutil
from pathlib import Path

from bench.cold import bring_in
from bench.comparing import same_bits
from bench.processes import Taken, measured
from bench.programs import analyze, materialize, materialize_cold
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import TINY, Setting, named

METHOD = "ties"
WRITES = "plain writes of all but one"


def variants_name(setting: Setting) -> str:
    """Return the name of the row."""
    return f"variants-{METHOD}-k{setting.extent.main}@{named(setting.large)}"


def one(state: str) -> str:
    """Return the way that writes one variant; ``state`` of the catalog is cold or warm."""
    return f"one, {state}"


def many(state: str) -> str:
    """Return the way that writes all variants."""
    return f"all, {state}"


def varying(setting: Setting) -> Row:
    """Return the row of one variant, all of them, and plain writes of as many bytes as all but one have."""
    name = variants_name(setting)
    place = setting.work / "scratch" / name

    def out(way: str) -> Path:
        return place / way.replace(", ", "-").replace(" ", "-")

    def ways() -> tuple[Way, ...]:
        family = setting.family(setting.large, setting.extent.main)
        recipes = [setting.recipe(METHOD, family, number / 100) for number in range(setting.extent.variants)]
        setting.scratch(name)
        tiny = setting.recipe(METHOD, setting.family(TINY, setting.extent.main))
        materialize_cold(setting, [tiny], place / "tiny", place / "tiny-catalog")
        analyze(setting, recipes[0], place / "warm")
        bring_in(family.weights())
        warm, cold = place / "warm", place / "cold"
        return (
            Way(one("cold"), lambda: materialize_cold(setting, recipes[:1], out(one("cold")), cold), out(one("cold"))),
            Way(many("cold"), lambda: materialize_cold(setting, recipes, out(many("cold")), cold), out(many("cold"))),
            Way(one("warm"), lambda: materialize(setting, recipes[:1], out(one("warm")), warm), out(one("warm"))),
            Way(many("warm"), lambda: materialize(setting, recipes, out(many("warm")), warm), out(many("warm"))),
            Way(WRITES, lambda: _plain_writes(setting, family.base, out(WRITES)), out(WRITES)),
        )

    def check() -> Checked:
        own = same_bits(out(one("cold")), out(one("warm")))
        if not own.same:
            return own
        written = sorted(path.name for path in out(many("cold")).iterdir())
        first = min(written, key=len)
        pairs = [(out(one("cold")), out(many("cold")) / first)]
        pairs += [(out(many("cold")) / variant, out(many("warm")) / variant) for variant in written]
        found = [same_bits(*pair) for pair in pairs]
        different = next((checked for checked in found if not checked.same), None)
        return different or Checked(True, f"alone and among {len(written)}, cold and warm: {found[0].found}")

    return Row(name, ways, check)


def _plain_writes(setting: Setting, model: Path, out: Path) -> Taken:
    """Write a model that is in the page cache as often as there are variants but one, with the same syncs."""
    script = f"""
        set -e
        for number in $(seq {setting.extent.variants - 1}); do
            mkdir -p '{out}'/$number
            for file in '{model}'/*; do
                dd if="$file" of='{out}'/$number/"${{file##*/}}" bs=1M conv=fsync status=none
            done
            sync '{out}'/$number '{out}'
        done
    """
    taken = measured(["bash", "-c", script], setting.variables())
    shutil.rmtree(out)  # nothing is compared with it, and it takes much of the disk
    return taken
