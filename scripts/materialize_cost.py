"""What hashing, syncing and checking reads cost `mergefs materialize`, against `cp` and `sync` of as many bytes."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

_WITHOUT: Final = """
import os, sys
from mergefs.cli import main
from mergefs.materialize import file_hashes, weights

class Nothing:
    def __init__(self, *_): pass
    def update(self, *_): pass
    def hexdigest(self): return "0" * 64

if "sync" in sys.argv[1]:
    os.fsync = lambda descriptor: None
if "hashes" in sys.argv[1]:
    file_hashes.blake3 = Nothing
    weights.hash_between = lambda cuts, view, known=None: ("0" * 64,) * (len(cuts) - 1)
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command without what its first argument names. Nobody can ask for that but here."""

WAYS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "materialize": ("", ()),
    "without checking reads": ("", ("--no-verify-reads",)),
    "without hashes of what is written": ("hashes", ()),
    "without fsync": ("sync", ()),
    "without all of these": ("hashes sync", ("--no-verify-reads",)),
}


def write_family(directory: Path, size: int, experts: int = 2) -> Path:
    """Write bf16 models of ``size`` bytes each, a base and its experts, and return a recipe that merges them."""
    from mergefs.checkpoint.dtypes import BF16
    from mergefs.checkpoint.header import encode_header

    rows = max(1, size // (2 * 4096 * 16))
    shapes = [(f"model.layers.{number}.mlp.up_proj.weight", (rows, 4096)) for number in range(16)]
    header = encode_header([(name, BF16, shape) for name, shape in shapes], {"format": "pt"})
    for number, name in enumerate(["base", *(f"expert-{n}" for n in range(1, experts + 1))]):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        with (directory / name / "model.safetensors").open("wb") as file:
            file.write(header)
            for layer in range(len(shapes)):
                # Finite numbers of ordinary size: the upper byte of each is that of something near one.
                random = np.random.default_rng((number, layer)).integers(0, 2**16, rows * 4096, dtype=np.uint16)
                file.write(((random & 0x80FF) | 0x3F00).tobytes())
    recipe = directory / "recipe.json"
    models = [{"model": str(directory / f"expert-{n}"), "parameters": {"weight": 0.5}} for n in range(1, experts + 1)]
    document = {"merge_method": "task_arithmetic", "base_model": str(directory / "base"), "models": models}
    recipe.write_text(json.dumps(document))
    return recipe


def measure(directory: Path, size: int, repeat: int, environment: dict[str, str]) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, on the clock and of the processors.

    The ways take turns; the first round is not counted. Planning is left out on the clock alone.
    """
    recipe, out = write_family(directory, size), directory / "out"

    def copy() -> float:
        started = time.perf_counter()
        subprocess.run(["cp", "-r", directory / "base", out], check=True)
        subprocess.run(["sync", "-f", out], check=True)
        return time.perf_counter() - started

    def materialize(without: str, options: tuple[str, ...]) -> float:
        command = [sys.executable, "-c", _WITHOUT, without, "materialize", "--json", *options, recipe, out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout)["seconds"])

    steps: dict[str, Callable[[], float]] = {"cp and sync": copy}
    for name, (without, options) in WAYS.items():
        steps[name] = lambda without=without, options=options: materialize(without, options)
    seconds: dict[str, list[float]] = {f"{name}{what}": [] for what in ("", ", processors") for name in steps}
    for turn in range(repeat + 1):
        for name, step in steps.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            before = _processor_seconds()
            elapsed = step()
            if turn:
                seconds[name].append(elapsed)
                seconds[f"{name}, processors"].append(_processor_seconds() - before)
    return seconds


def _processor_seconds() -> float:
    """Return what all commands until now have taken of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
