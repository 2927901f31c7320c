"""Memory: reading a merge of any size takes the cache and a fixed amount beside it."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Family
from mounting import environment, mounted_recipes
from recipes import Merge, recipe_document, write_document, write_recipe

from mergefs.checkpoint.dtypes import BF16
from mergefs.checkpoint.header import encode_header

CACHE = 64 * 2**20
ALLOWED = CACHE + 300 * 10**6
"""Bytes of resident memory that reading may ever take: fewer than one of the models has."""

LAYERS = 17
SHAPES = {
    "model.embed_tokens.weight": (65536, 1024),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in {
            "input_layernorm": (1024,),
            "self_attn.q_proj": (1024, 1024),
            "self_attn.o_proj": (1024, 1024),
            "mlp.gate_proj": (4096, 1024),
            "mlp.up_proj": (4096, 1024),
            "mlp.down_proj": (1024, 4096),
        }.items()
    },
}
WEIGHT_BYTES = sum(2 * math.prod(shape) for shape in SHAPES.values())

MERGES = {
    "task_arithmetic": Merge("task_arithmetic", ({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2})),
    "ties": Merge("ties", tuple({"weight": weight, "density": 0.4} for weight in (0.5, 0.3, 0.2))),
}

_RUN = """
import sys
from pathlib import Path
from mergefs.cli import main
status = main(sys.argv[1:])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
sys.exit(status)
"""

_READ_ALL = """
import pathlib, sys
with pathlib.Path(sys.argv[1]).open("rb", buffering=0) as file:
    total = 0
    while chunk := file.read(1 << 20):
        total += len(chunk)
print(total)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """A base and three experts of 610 MB each."""
    directory = tmp_path_factory.mktemp("models")
    base, *experts = [write_model(directory / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))]
    yield Family(base, tuple(experts))
    shutil.rmtree(directory)


def write_model(directory: Path, seed: int) -> Path:
    """Write a model of random weights between 2**-15 and 2**-8 in magnitude, made from one pool of such numbers."""
    directory.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(seed)
    pool = generator.integers(0, 2**16, 2**23, dtype=np.uint16)
    pool = (pool & np.uint16(0x83FF)) | np.uint16(0x3800)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(encode_header([(name, BF16, shape) for name, shape in SHAPES.items()], {"format": "pt"}))
        for shape in SHAPES.values():
            missing = math.prod(shape)
            while missing:
                start = int(generator.integers(0, pool.size // 2))
                piece = pool[start : start + min(missing, pool.size // 2)]
                file.write(piece.data)
                missing -= piece.size
    return directory


def peak_memory(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reader(path: Path) -> subprocess.Popen[str]:
    """Start a process that reads a file from its beginning to its end."""
    return subprocess.Popen([sys.executable, "-c", _READ_ALL, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("name", MERGES)
def test_reading_a_mount_takes_no_more_memory_than_its_cache_and_300_mb(
    models: Family, tmp_path: Path, name: str, readers: int
) -> None:
    assert WEIGHT_BYTES > 600 * 10**6 > ALLOWED
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], models)
    mountpoint = tmp_path / "mnt"
    options = ["--cache-size", str(CACHE)]
    with mounted_recipes(recipe, mountpoint=mountpoint, state=tmp_path / "state", options=options) as mount:
        path = mountpoint / "model.safetensors"
        processes = [reader(path) for _ in range(readers)]
        for process in processes:
            assert int(process.communicate(timeout=240)[0]) == path.stat().st_size > WEIGHT_BYTES
        peak = peak_memory(mount.pid)
    print(f"{name}, {readers} readers: {peak / 10**6:.0f} MB")
    assert peak < ALLOWED


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("command", ["materialize", "analyze"])
def test_going_over_models_that_are_larger_than_the_memory_for_it_keeps_to_that(
    models: Family, tmp_path: Path, command: str, name: str
) -> None:
    """Of models that nobody knows, so that as much as possible is held of them."""
    limit = 512 * 2**20
    assert limit < WEIGHT_BYTES
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], models)
    arguments = {"materialize": ["--quiet", "--threads", "2", recipe, tmp_path / "out"], "analyze": [recipe]}[command]
    result = subprocess.run(
        [sys.executable, "-c", _RUN, command, "--memory", str(limit), *map(str, arguments)],
        env=environment(tmp_path / "state"),
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(result.stdout.split()[-2]) * 1024
    print(f"{command} {name}: {peak / 10**6:.0f} MB")
    assert peak <= limit


def test_neither_does_a_merge_of_slices_of_another_merge(models: Family, tmp_path: Path) -> None:
    inner = {**recipe_document(MERGES["ties"], models), "name": "inner"}
    parts: list[tuple[Path | str, int, int]] = [("inner", 0, 12), (models.experts[2], 3, 12), ("inner", 5, LAYERS)]
    outer = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": [start, stop]}]} for model, start, stop in parts],
    }
    recipe = write_document(tmp_path / "recipe.yml", [inner, outer])
    options = ["--cache-size", str(CACHE)]
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", options=options) as mount:
        path = tmp_path / "mnt" / "model.safetensors"
        assert int(reader(path).communicate(timeout=240)[0]) == path.stat().st_size > 10**9
        peak = peak_memory(mount.pid)
    print(f"slices of a merge: {peak / 10**6:.0f} MB")
    assert peak < ALLOWED
