"""The files of the merged model: which tensors go into which shard, and their headers.

Where much of a merged model is copied from files, its own files are cut as those are, in the same order, and their data
begins at the same place of a page: a file system can then share the copied pages between both. Elsewhere the layout
follows from names and shapes alone.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mergefs.checkpoint.header import encode_header
from mergefs.planner.copies import SMALLEST, asked_copies, source_of_copies
from mergefs.planner.plan import OutputFile, TensorPlan

_ALIGNMENT: Final = 4096
"""Tensor data starts at a page of its own, so that ranges can be mapped as whole pages."""
_UNIT: Final = 8
"""Lengths of headers are multiples of it."""
_MUCH: Final = 16
"""A layout follows files that at least one byte in so many is copied from: sharing fewer is not worth it."""


def lay_out(tensors: Sequence[TensorPlan], max_shard_size: int) -> tuple[OutputFile, ...]:
    """Return the files for ``tensors`` in the given order, none with more than ``max_shard_size`` bytes of tensors.

    A tensor larger than that gets a file of its own.
    """
    shards = _cut(tensors, max_shard_size)
    return tuple(_output_file(name, shard, 0) for name, shard in zip(_names(len(shards)), shards, strict=True))


def lay_out_for_sharing(tensors: Sequence[TensorPlan], max_shard_size: int) -> tuple[OutputFile, ...]:
    """Return the files as ``lay_out`` does, but cut and aligned as the files that much of them is copied from.

    It follows from what is asked and from how those files are cut, which is no part of a plan's id: the tensors are the
    same, whatever files they lie in.
    """
    copied = {
        tensor.name: sum(copy.end - copy.begin for copy in asked_copies(tensor) if copy.end - copy.begin >= SMALLEST)
        for tensor in tensors
    }
    if sum(copied.values()) * _MUCH < sum(tensor.nbytes for tensor in tensors) or not any(copied.values()):
        return lay_out(tensors, max_shard_size)
    shards = [shard for group in _by_source(tensors) for shard in _cut(group, max_shard_size)]
    return tuple(
        _output_file(name, shard, _place_in_page(shard, copied))
        for name, shard in zip(_names(len(shards)), shards, strict=True)
    )


def lay_out_as_written(
    tensors: Mapping[str, TensorPlan], written: Mapping[str, tuple[str, int]]
) -> tuple[OutputFile, ...]:
    """Return the files of a plan as a model has them that has each tensor at such a place (file, offset).

    So they were laid out when the sources were cut otherwise; where tensors cannot have lain like that, by their order.
    """
    files: dict[str, list[tuple[int, int, TensorPlan]]] = {}
    for name, tensor in tensors.items():
        file, offset = written[name]
        files.setdefault(file, []).append((offset, tensor.nbytes, tensor))  # an empty one before what begins there
    found = []
    for file, listed in sorted(files.items()):
        listed.sort(key=lambda entry: entry[:2])
        found.append(_output_file(file, [tensor for *_, tensor in listed], listed[0][0] % _ALIGNMENT))
    return tuple(found)


def index_json(files: Sequence[OutputFile], total_size: int) -> bytes:
    """Return ``model.safetensors.index.json`` for sharded files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _cut(tensors: Sequence[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    """Return ``tensors`` in runs of at most so many bytes."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _names(count: int) -> list[str]:
    """Return what so many files are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _by_source(tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
    """Return the tensors of each file that they are copied from, in the order of their offsets there.

    One that is copied from nowhere goes with the one before it.
    """
    directories: dict[Path, int] = {}
    groups: dict[tuple[int, int], list[tuple[int, TensorPlan]]] = {}
    key, place = (0, 0), 0
    for tensor in tensors:
        source = source_of_copies(tensor)
        if source is not None:
            number = directories.setdefault(source.shard.path.parent, len(directories))
            key, place = (number, source.tensor.shard), source.tensor.offset
        groups.setdefault(key, []).append((place, tensor))
    in_order = (sorted(groups[key], key=lambda entry: entry[0]) for key in sorted(groups))
    return [[tensor for _, tensor in group] for group in in_order]


def _place_in_page(tensors: Sequence[TensorPlan], copied: Mapping[str, int]) -> int:
    """Return where in a page the data of a file begins so that most ``copied`` bytes lie as in their source."""
    votes: Counter[int] = Counter()
    position = 0
    for tensor in tensors:
        source = source_of_copies(tensor)
        if source is not None:
            votes[(source.tensor.offset - position) % _ALIGNMENT] += copied[tensor.name]
        position += tensor.nbytes
    possible = [place for place in votes if place % _UNIT == 0 and votes[place]]
    return max(possible, key=lambda place: (votes[place], -place), default=0)


def _output_file(name: str, tensors: Sequence[TensorPlan], place_in_page: int) -> OutputFile:
    """Return one file with its header and offsets."""
    described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    header = encode_header(described, {"format": "pt"}, _ALIGNMENT, place_in_page)
    offsets: list[int] = []
    position = len(header)
    for tensor in tensors:
        offsets.append(position)
        position += tensor.nbytes
    return OutputFile(name, header, tuple(tensor.name for tensor in tensors), tuple(offsets), position)
