"""How fast a mount is read, beside the engine that computes it and the file that it could have been."""

import filecmp
from collections.abc import Callable

from bench.cold import bring_in, evict
from bench.mounting import mounted, read
from bench.processes import Taken
from bench.programs import analyze, materialize
from bench.results import Checked
from bench.rounds import Row, Way
from bench.setting import Setting, named
from mergefs.materialize.manifest import MANIFEST_NAME

PATTERNS = ("sequential", "random", "mmap")


def mount_name(setting: Setting, method: str) -> str:
    """Return the name of the row."""
    return f"mount-{method}-k{setting.extent.main}@{named(setting.large)}"


def first(pattern: str) -> str:
    """Return the way that reads a new mount."""
    return f"mount, {pattern}"


def again(pattern: str) -> str:
    """Return the way that reads a mount a second time."""
    return f"mount, {pattern}, again"


def file(pattern: str) -> str:
    """Return the way that reads the materialized files, which are in the page cache."""
    return f"file, {pattern}"


FILE_COLD = "file, sequential, from the disk"
ENGINE = "engine, sequential"


def mounting(setting: Setting, method: str) -> Row:
    """Return the row of reads of a mount: sequential, at random, and mapped; first and again; and of the files."""
    name = mount_name(setting, method)
    place = setting.work / "scratch" / name
    catalog, written, mountpoint = place / "catalog", place / "written", place / "mnt"

    def ways() -> tuple[Way, ...]:
        family = setting.family(setting.large, setting.extent.main)
        recipe = setting.recipe(method, family)
        setting.scratch(name)
        analyze(setting, recipe, catalog)
        bring_in(family.weights())
        materialize(setting, [recipe], written, catalog)

        def of_mount(pattern: str, times: int) -> Callable[[], Taken]:
            def run() -> Taken:
                with mounted(setting, recipe, mountpoint, catalog) as mount:
                    for _ in range(times):
                        taken = read(setting, pattern, mountpoint)
                    peak = mount.peak_bytes()
                return Taken(taken.seconds, taken.processor_seconds, peak, taken.facts)

            return run

        def of_file(pattern: str, cold: bool = False) -> Callable[[], Taken]:
            def run() -> Taken:
                files = sorted(written.glob("*.safetensors"))
                if cold:
                    evict(files)
                else:
                    read(setting, "sequential", written)
                return read(setting, pattern, written)

            return run

        found = [
            Way(ENGINE, lambda: read(setting, "engine", recipe, catalog)),
            Way(FILE_COLD, of_file("sequential", True)),
        ]
        for pattern in PATTERNS:
            found += [
                Way(first(pattern), of_mount(pattern, 1)),
                Way(again(pattern), of_mount(pattern, 2)),
                Way(file(pattern), of_file(pattern)),
            ]
        return tuple(found)

    def check() -> Checked:
        recipe = setting.recipe(method, setting.family(setting.large, setting.extent.main))
        names = sorted(path.name for path in written.iterdir() if path.name != MANIFEST_NAME)
        with mounted(setting, recipe, mountpoint, catalog):
            same, differing, missing = filecmp.cmpfiles(mountpoint, written, names, shallow=False)
        if differing or missing:
            return Checked(False, f"in mount and directory these are not the same: {', '.join(differing + missing)}")
        return Checked(True, f"all {len(same)} files of mount and directory have the same bytes")

    return Row(name, ways, check)
