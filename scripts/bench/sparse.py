"""Models of any size as files of holes: they have headers and sizes, and no bytes on disk."""

import json
import math
from pathlib import Path
from typing import Any, Final

from bench.shapes import Shape, shard_name, weight_map

_SHARD_BYTES: Final = 5 * 10**9


def write_sparse_model(directory: Path, shape: Shape, shard_size: int = _SHARD_BYTES) -> int:
    """Write a sharded bf16 model whose data are holes, and return its number of parameters."""
    from mergefs.checkpoint.dtypes import BF16
    from mergefs.checkpoint.header import encode_header

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards = shape.shards(shard_size)
    for number, tensors in enumerate(shards, start=1):
        header = encode_header([(name, BF16, dimensions) for name, dimensions in tensors.items()], {"format": "pt"})
        with (directory / shard_name(number, len(shards))).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * sum(map(math.prod, tensors.values())))
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map(shards)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return shape.parameters


def write_sparse_family(directory: Path, shape: Shape, experts: int) -> tuple[Path, int]:
    """Write a base and its experts as sparse files; return a ties recipe for them and the parameters of each."""
    names = ["base", *(f"expert-{number}" for number in range(1, experts + 1))]
    parameters = [write_sparse_model(directory / name, shape) for name in names]
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(directory / "base"),
        "models": [
            {"model": str(directory / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in names[1:]
        ],
        "dtype": "bfloat16",
    }
    path = directory / "ties.yml"
    path.write_text(json.dumps(recipe, indent=2))
    return path, parameters[0]
