"""Families of models on disk: a base and experts whose deltas are such as fine-tuning leaves in BF16.

Fine-tuning moves most weights by less than BF16 can tell, and few by more than some units in the last place (ulp). So
of each expert's elements fixed shares are 0, 1, and 2 or more ulps away from the base's: ``SHARES``. Norms are frozen
in all experts, and the embedding of tokens in every second one. Nothing else about the models matters to a merge's
time; numbers are drawn by a counter, so a family is the same on every machine.
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.shapes import Shape, shape_of_size, shard_name, weight_map

SHARES: Final[Mapping[int, float]] = {0: 0.50, 1: 0.35, 2: 0.10, 3: 0.03, 4: 0.01, 6: 0.01}
"""The share of an expert's elements that are so many ulps from the base's, half of them up and half of them down."""

_VERSION: Final = 1
_SHARDS: Final = 3
_CHUNK: Final = 8 * 2**20
"""Elements that are made at a time."""

_DEVIATION: Final = 0.02
_DRAWS: Final = 2**16

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A base and its experts, each a model directory; ``parameters`` are those of each."""

    base: Path
    experts: tuple[Path, ...]
    parameters: int

    def first(self, count: int) -> "Family":
        """Return the family with its first ``count`` experts."""
        return Family(self.base, self.experts[:count], self.parameters)

    def weights(self) -> list[Path]:
        """Return all files of weights."""
        return [path for model in (self.base, *self.experts) for path in sorted(model.glob("*.safetensors"))]


def make_family(directory: Path, size: int, experts: int) -> Family:
    """Return a family of models of ``size`` bytes each below ``directory``; what is there already is kept."""
    shape = shape_of_size(size)
    place = directory / f"llama-{shape.parameters}-v{_VERSION}"
    names = ["base", *(f"expert-{number:02d}" for number in range(1, experts + 1))]
    missing = [(number, name) for number, name in enumerate(names) if not (place / name).is_dir()]
    if missing:
        _kernels()  # compiled by one thread, before several need them
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda entry: _write_model(place / entry[1], shape, entry[0]), missing))
    base, *others = (place / name for name in names)
    return Family(base, tuple(others), shape.parameters)


def _write_model(directory: Path, shape: Shape, expert: int) -> None:
    """Write one model, the base where ``expert`` is 0. The directory appears when it is complete."""
    from mergefs.checkpoint.dtypes import BF16
    from mergefs.checkpoint.header import encode_header

    unfinished = directory.with_name(f"{directory.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    total = -(-2 * shape.parameters // _SHARDS)
    shards = shape.shards(total)
    numbers = {name: number for number, name in enumerate(shape.tensors())}
    for number, tensors in enumerate(shards, start=1):
        with (unfinished / shard_name(number, len(shards))).open("wb") as file:
            file.write(encode_header([(name, BF16, size) for name, size in tensors.items()], {"format": "pt"}))
            for name, dimensions in tensors.items():
                elements = math.prod(dimensions)
                for first in range(0, elements, _CHUNK):
                    count = min(_CHUNK, elements - first)
                    file.write(_elements(name, numbers[name], first, count, expert).data)
            file.flush()
            os.fsync(file.fileno())
    (unfinished / "config.json").write_text(json.dumps(shape.config(), indent=2))
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map(shards)}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
    unfinished.rename(directory)


def _elements(name: str, tensor: int, first: int, count: int, expert: int) -> Array:
    """Return elements of a tensor, as the 16 bits of BF16 each; ``first`` is a multiple of 4."""
    fill, move = _kernels()
    is_norm = name.endswith("norm.weight")
    found = np.empty(count, dtype=np.uint16)
    fill(found, _stream(tensor, 0) + first // 4, _normal_values(1.0 if is_norm else 0.0))
    frozen = is_norm or (name == "model.embed_tokens.weight" and expert % 2 == 0)
    if expert and not frozen:
        move(found, _stream(tensor, expert) + first // 4, _steps())
    return found


def _stream(tensor: int, expert: int) -> int:
    """Return where the counter of a tensor of a model starts: far from all others."""
    return (expert << 52) + (tensor << 36)


@lru_cache
def _normal_values(mean: float) -> Array:
    """Return the quantiles of a normal distribution in BF16, one for each draw."""
    from statistics import NormalDist

    quantile = NormalDist(mean, _DEVIATION).inv_cdf
    values = np.array([quantile((draw + 0.5) / _DRAWS) for draw in range(_DRAWS)], dtype=np.float32)
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


@lru_cache
def _steps() -> Array:
    """Return by how many ulps an element moves, for each draw."""
    steps = np.zeros(_DRAWS, dtype=np.int16)
    begin = 0
    for ulps, share in SHARES.items():
        end = begin + round(share * _DRAWS)
        steps[begin:end] = ulps
        steps[begin : (begin + end) // 2] = -ulps
        begin = end
    return steps


@lru_cache
def _kernels() -> tuple[Any, Any]:
    """Return what fills an array with draws from a table, and what moves BF16 numbers by drawn steps."""
    import numba

    @numba.njit(nogil=True)
    def mixed(counter: Any) -> Any:
        """Return 64 random bits for a counter (splitmix64: Steele, Lea and Flood, 2014)."""
        x = (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    @numba.njit(nogil=True)
    def fill(out: Any, counter: Any, table: Any) -> None:
        for i in range(0, len(out), 4):
            bits = mixed(np.uint64(counter) + np.uint64(i // 4))
            for j in range(i, min(i + 4, len(out))):
                out[j] = table[bits & np.uint64(0xFFFF)]
                bits >>= np.uint64(16)

    @numba.njit(nogil=True)
    def move(values: Any, counter: Any, table: Any) -> None:
        for i in range(0, len(values), 4):
            bits = mixed(np.uint64(counter) + np.uint64(i // 4))
            for j in range(i, min(i + 4, len(values))):
                magnitude = np.int32(values[j] & 0x7FFF) + table[bits & np.uint64(0xFFFF)]
                values[j] = (values[j] & 0x8000) | np.uint16(max(magnitude, 0))
                bits >>= np.uint64(16)

    for kernel, table in ((fill, _normal_values(0.0)), (move, _steps())):
        kernel(np.zeros(4, dtype=np.uint16), 0, table)
    return fill, move
