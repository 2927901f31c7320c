"""The files of the merged model: which tensors go into which shard, and their headers."""

import json
from collections.abc import Sequence
from typing import Final

from mergefs.checkpoint.header import encode_header
from mergefs.planner.plan import OutputFile, TensorPlan

_ALIGNMENT: Final = 4096
"""Tensor data starts at a page of its own, so that ranges can be mapped and copied as whole pages."""


def lay_out(tensors: Sequence[TensorPlan], max_shard_size: int) -> tuple[OutputFile, ...]:
    """Return the files for ``tensors`` in the given order, none with more than ``max_shard_size`` bytes of tensors.

    A tensor larger than that gets a file of its own.
    """
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return (_output_file("model.safetensors", shards[0]),)
    return tuple(
        _output_file(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    )


def index_json(files: Sequence[OutputFile], total_size: int) -> bytes:
    """Return ``model.safetensors.index.json`` for sharded files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _output_file(name: str, tensors: Sequence[TensorPlan]) -> OutputFile:
    """Return one file with its header and offsets."""
    header = encode_header([(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"}, _ALIGNMENT)
    offsets: list[int] = []
    position = len(header)
    for tensor in tensors:
        offsets.append(position)
        position += tensor.nbytes
    return OutputFile(name, header, tuple(t.name for t in tensors), tuple(offsets), position)
