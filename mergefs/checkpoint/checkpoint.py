"""A model directory, opened: which tensors it has and where their bytes are. Nothing but headers is read."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from mergefs.checkpoint.auxiliary import find_auxiliary_files
from mergefs.checkpoint.configuration import number_of_layers, ties_embeddings
from mergefs.checkpoint.dtypes import DType
from mergefs.checkpoint.files import open_source, read_json_object
from mergefs.checkpoint.header import read_header
from mergefs.checkpoint.quantization import refuse_quantized
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint, Shard
from mergefs.checkpoint.weights import INDEX_NAME, PICKLE_SUFFIXES, WeightFiles, find_weight_files
from mergefs.errors import CheckpointError, SourceReadError


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where one tensor of a checkpoint lies: ``nbytes`` bytes from ``offset`` of file ``Checkpoint.shards[shard]``."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


class WeightSource(Protocol):
    """A directory of safetensors files: a checkpoint, or an adapter."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Its files."""

    @property
    def checked_files(self) -> tuple[Shard | AuxiliaryFile, ...]:
        """The files that must stay as they are for its bytes to be what was planned."""

    @property
    def tensors(self) -> Mapping[str, TensorSource]:
        """Its tensors, by name."""

    @property
    def total_bytes(self) -> int:
        """The bytes of their data."""

    @property
    def local_identity(self) -> str:
        """The identity of these files on this machine."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A Hugging Face model directory with safetensors weights.

    ``path`` is absolute and resolved, ``config`` is the content of ``config.json``, ``tensors`` are sorted by
    name, and ``total_bytes`` counts their data. ``local_identity`` changes whenever a weight file is written to or
    replaced; it means nothing on another machine.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorSource]
    auxiliary: tuple[AuxiliaryFile, ...]
    total_bytes: int
    local_identity: str

    @property
    def checked_files(self) -> tuple[Shard, ...]:
        """Its weights."""
        return self.shards

    @property
    def number_of_layers(self) -> int | None:
        """The number of layers (of the text model, where there are several), or None when config.json is silent."""
        return number_of_layers(self.config)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        return ties_embeddings(self.config, self.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the model directory ``path``; reads ``config.json``, the index and the headers of the weights only.

    Raises CheckpointError when the directory is missing, incomplete, damaged or contradicts itself,
    UnsupportedCheckpointError when it holds something that must not be merged as it is (pickles, quantised codes, a
    LoRA adapter, other formats), and SourceReadError when the operating system cannot give its bytes.
    """
    directory = _resolve(path)
    files = find_weight_files(directory)
    config = _read_config(directory)
    shards = tuple(_open_shard(directory, name, files) for name in files.names)
    tensors, contested = _gather_tensors(directory, files, shards)
    refuse_quantized(directory, config, tensors)
    return Checkpoint(
        path=directory,
        config=config,
        shards=shards,
        tensors=tensors,
        auxiliary=find_auxiliary_files(directory),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        local_identity=_local_identity(shards, contested),
    )


def _resolve(path: Path) -> Path:
    try:
        directory = Path(path).expanduser().resolve(strict=True)
        is_directory = directory.is_dir()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model directory {str(path)!r} does not exist; check the path, or download the model and give the "
            "directory that holds its config.json"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceReadError(
            f"model directory {str(path)!r} cannot be opened ({reason}); check the path and its permissions"
        ) from error
    if not is_directory:
        kind = "a pickle file" if directory.suffix in PICKLE_SUFFIXES else "a file"
        raise CheckpointError(f"{directory} is {kind}, not a model directory; give the directory that holds it")
    return directory


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{directory} has no config.json; give a complete Hugging Face model directory, or copy the file there"
        )
    return read_json_object(path)


def _open_shard(directory: Path, name: str, files: WeightFiles) -> Shard:
    path = directory / name
    if files.index is not None and _is_absent(path):
        tensor = next(tensor for tensor, file_name in files.index.items() if file_name == name)
        raise CheckpointError(
            f"{path} does not exist, but {INDEX_NAME} says that it holds tensor {tensor!r}; download the missing shard"
        )
    with open_source(path) as descriptor:
        fingerprint = Fingerprint.of(os.fstat(descriptor))
        return Shard(path, fingerprint, read_header(descriptor, path))


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # it is there, or may be: opening it gives the reason
    return False


def _gather_tensors(
    directory: Path, files: WeightFiles, shards: Sequence[Shard]
) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Return the tensors by name, sorted, and for those that lie in several shards, which shard was taken."""
    index = files.index or {}
    holders: defaultdict[str, list[TensorSource]] = defaultdict(list)
    for number, shard in enumerate(shards):
        for tensor in shard.header.tensors:
            holders[tensor.name].append(
                TensorSource(tensor.name, tensor.dtype, tensor.shape, number, tensor.begin, tensor.end - tensor.begin)
            )
    tensors: dict[str, TensorSource] = {}
    contested: dict[str, str] = {}
    for name in sorted(holders.keys() | index.keys()):
        sources = holders.get(name, [])
        if name in index:
            sources = [source for source in sources if files.names[source.shard] == index[name]]
            if not sources:
                raise CheckpointError(
                    f"{directory / INDEX_NAME} says that {index[name]} holds tensor {name!r}, but it does not; "
                    "download the model again, or repair the index"
                )
            if len(holders[name]) > 1:
                contested[name] = index[name]
        elif len(sources) > 1:
            first, second = (files.names[source.shard] for source in sources[:2])
            raise CheckpointError(
                f"{directory} holds tensor {name!r} both in {first} and in {second}, and no index says which is "
                f"meant; delete the file that does not belong there, or add {INDEX_NAME}"
            )
        tensors[name] = sources[0]
    return tensors, contested


def _local_identity(shards: Sequence[Shard], contested: Mapping[str, str]) -> str:
    """Return the identity of these files on this machine, for as long as nobody writes to them.

    Shards are in the order of their names. The device is left out: its number may change when the machine restarts.
    """
    digest = blake3(b"mergefs local identity 1\n")
    for shard in shards:
        mark = shard.fingerprint
        digest.update(f"{shard.header.digest} {mark.size} {mark.mtime_ns} {mark.ctime_ns} {mark.inode}\n".encode())
    for name, file_name in sorted(contested.items()):
        digest.update(f"{name!r} {file_name!r}\n".encode())
    return f"local-{digest.hexdigest()}"
