"""How soon a mounted directory of recipes gives the first tensor of an edited recipe, against one planned before."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.families import Family, make_family
from bench.processes import environment
from bench.startup import Measurement

METHODS: Final = ("task_arithmetic", "ties")
"""One that needs no statistics, and one whose thresholds the first read of a tensor finds."""

_EDITED: Final = "edit until its first tensor is read"
_PLANNED: Final = "first tensor, planned before, nothing cached"
_SHOWN: Final = "edit until the name shows the new plan"
_MORE: Final = "what the edit takes more"
_ADDED: Final = "added recipe until its model is there"
_BROKEN: Final = "broken recipe until it says why"
_REMOVED: Final = "removed recipe until its name is gone"
_CHANGES: Final = (_ADDED, _BROKEN, _REMOVED)

_AT_ONCE: Final = 0.2
"""Seconds that the switch of an A/B may take beyond the reading."""

_SHOWS: Final = 1.0
"""Seconds within which any change must show."""


def measure_switching(directory: Path, size: int, beside: int, repeat: int) -> tuple[int, list[Measurement]]:
    """Return the parameters of each model, and what was measured in ``repeat`` rounds after one that is not counted.

    ``beside`` other recipes are in the directory that is mounted, and every round edits one of each method. What that
    then gives is compared with what a mount with a catalog of its own gives, which had planned the same recipe before.
    """
    family = make_family(directory / "models", size, experts=2)
    recipes = directory / "recipes"
    recipes.mkdir()
    for number in range(beside):
        _write_recipe(recipes / f"other-{number}.yml", family, METHODS[0], 0.1 + number / 100)
    for method in METHODS:
        _write_recipe(recipes / f"{method}.yml", family, method, 0.5)
    seconds: dict[str, list[float]] = {}
    with _mounted(recipes, directory / "live", directory / "catalog") as live:
        for turn in range(repeat + 1):
            taken = _come_and_go(recipes, live, family)
            for method in METHODS:
                share = 0.2 + 0.25 * turn / (repeat + 1)
                found = _switch(directory, live, family, method, share)
                taken |= {f"{method}: {what}": elapsed for what, elapsed in found.items()}
            for what, elapsed in taken.items() if turn else ():
                seconds.setdefault(what, []).append(elapsed)
    targets = dict.fromkeys(_CHANGES, _SHOWS) | {f"{method}: {_MORE}": _AT_ONCE for method in METHODS}
    return family.parameters, [Measurement(what, tuple(times), targets.get(what)) for what, times in seconds.items()]


def _switch(directory: Path, live: Path, family: Family, method: str, share: float) -> dict[str, float]:
    """Edit a recipe and read it, and then read the same where it has been planned."""
    name = live / method
    _first_tensor(name)
    before = name.readlink()
    started = time.perf_counter()
    _write_recipe(directory / "recipes" / f"{method}.yml", family, method, share)
    while name.readlink() == before:
        time.sleep(0.0001)
    shown = time.perf_counter() - started
    after = _first_tensor(name)
    edited = time.perf_counter() - started

    recipe = directory / "planned.yml"
    _write_recipe(recipe, family, method, share)
    with _mounted(recipe, directory / "cold", directory / f"catalog-{method}-{share}") as cold:
        _wake(cold)
        started = time.perf_counter()
        expected = _first_tensor(cold)
        planned = time.perf_counter() - started
    if after != expected:
        raise RuntimeError(f"the edited {method} recipe did not give what it says")
    return {_SHOWN: shown, _EDITED: edited, _PLANNED: planned, _MORE: edited - planned}


def _come_and_go(recipes: Path, live: Path, family: Family) -> dict[str, float]:
    """Add a recipe, break it and remove it, each time when its name has just been asked for."""
    recipe, name = recipes / "guest.yml", live / "guest"
    taken = {}
    for what, change, shows in (
        (_ADDED, lambda: _write_recipe(recipe, family, METHODS[0], 0.75), (name / "config.json").exists),
        (_BROKEN, lambda: recipe.write_text("merge_method: ["), (name / "ERROR.txt").exists),
        (_REMOVED, recipe.unlink, lambda: not name.is_symlink()),
    ):
        name.is_symlink()
        started = time.perf_counter()
        change()
        while not shows():
            time.sleep(0.0001)
        taken[what] = time.perf_counter() - started
    return taken


def _write_recipe(path: Path, family: Family, method: str, share: float) -> None:
    """Write a merge of the experts as an editor saves a file: beside it, and then in its place."""
    models = [{"model": str(expert), "parameters": {"weight": share}} for expert in family.experts]
    document = {"merge_method": method, "base_model": str(family.base), "models": models, "dtype": "bfloat16"}
    if method == "ties":
        document["parameters"] = {"density": share}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document))
    unfinished.replace(path)


def _weights(model: Path) -> Sequence[Path]:
    return sorted(model.glob("*.safetensors"))


def _first_tensor(model: Path) -> bytes:
    """Read a model's first file up to the end of the tensor that lies first, as a loader would."""
    with _weights(model)[0].open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        end = min(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        data = file.read(end)
    if len(data) != end:
        raise RuntimeError(f"{model} gave {len(data)} of {end} bytes")
    return data


def _wake(model: Path) -> None:
    """Have a server do once what it does only once, by a read of the last bytes, which no first tensor has."""
    with _weights(model)[-1].open("rb") as file:
        file.seek(-(1 << 20), os.SEEK_END)
        file.read()


@contextmanager
def _mounted(recipes: Path, mountpoint: Path, catalog: Path) -> Iterator[Path]:
    """Mount for as long as it is needed."""
    variables = environment(mountpoint.parent) | {"MERGEFS_CATALOG": str(catalog)}
    mergefs = [sys.executable, "-m", "mergefs"]
    mountpoint.mkdir(exist_ok=True)
    subprocess.run([*mergefs, "mount", recipes, mountpoint], env=variables, check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run([*mergefs, "umount", mountpoint], env=variables, check=True)
