"""How each program is run: mergefs, mergekit as its users run it, and the plain copying that no merge can beat."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.processes import FREE, Limits, Taken, measured
from bench.setting import Setting

MERGEFS: Final = (sys.executable, "-m", "mergefs")

_SEED: Final = ("--random-seed", "1")
SAME_OPTIONS: Final = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card", *_SEED)
"""Given to both: these models have no tokenizer, and neither program is to write what the other does not."""

MERGEKIT_OPTIONS: Final[tuple[str, ...]] = ("--async-write",)
"""What makes mergekit fastest on a CPU, of the options that it offers for that; the benchmark compares them."""

_COUNTED: Final = ("expert_bytes_read", "base_bytes_read", "analysis_bytes_read", "bytes_written")


def mergekit(
    setting: Setting, recipe: Path, out: Path, options: Sequence[str] = MERGEKIT_OPTIONS, limits: Limits = FREE
) -> Taken:
    """Run ``mergekit-yaml`` with as many threads as the setting has."""
    command = [Path(sys.executable).with_name("mergekit-yaml"), recipe, out, *SAME_OPTIONS, *options]
    threads = len(limits.processors) or setting.threads
    return measured([*command, "--num-threads", str(threads)], setting.variables(), limits)


def materialize(
    setting: Setting,
    recipes: Sequence[Path],
    out: Path,
    catalog: Path,
    options: Sequence[str] = (),
    limits: Limits = FREE,
) -> Taken:
    """Run ``mergefs materialize`` on recipes with what ``catalog`` knows."""
    command = [*MERGEFS, "materialize", *recipes, out, *SAME_OPTIONS, "--json", *options]
    taken = measured(command, setting.variables(catalog), limits)
    return Taken(taken.seconds, taken.processor_seconds, taken.peak_bytes, _facts(taken.output))


def _facts(printed: str) -> dict[str, float]:
    """Return what mergefs says that it read and wrote, as the last of the JSON objects that it printed."""
    end, decoder, last = 0, json.JSONDecoder(), {}
    while (begin := printed.find("{", end)) >= 0:
        last, end = decoder.raw_decode(printed, begin)
    return {name: last[name] for name in _COUNTED if name in last}


def materialize_cold(
    setting: Setting,
    recipes: Sequence[Path],
    out: Path,
    catalog: Path,
    options: Sequence[str] = (),
    limits: Limits = FREE,
) -> Taken:
    """Run ``mergefs materialize`` with a new catalog."""
    shutil.rmtree(catalog, ignore_errors=True)
    return materialize(setting, recipes, out, catalog, options, limits)


def analyze(setting: Setting, recipe: Path, catalog: Path) -> Taken:
    """Run ``mergefs analyze`` with a new catalog."""
    shutil.rmtree(catalog, ignore_errors=True)
    return measured([*MERGEFS, "analyze", recipe, *_SEED], setting.variables(catalog))


def copying(setting: Setting, read: Sequence[Path], copied: Path, out: Path) -> Taken:
    """Read the models ``read``, and copy the model ``copied`` to ``out`` with the syncs of a transaction.

    ``cat`` and ``dd`` move the bytes, one after the other, as a careful script would.
    """
    inputs = " ".join(f"'{path}'/*.safetensors" for path in read)
    script = f"""
        set -e
        mkdir '{out}'
        cat {inputs} > /dev/null
        for file in '{copied}'/*; do
            dd if="$file" of='{out}'/"${{file##*/}}" bs=1M conv=fsync status=none
        done
        sync '{out}' '{out.parent}'
    """
    return measured(["bash", "-c", script], setting.variables())
