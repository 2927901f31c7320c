"""A LoRA adapter of PEFT, opened: what it adds to which modules of a model. Nothing but headers is read.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) changes the weight of a module by the product of two thin
matrices, ``B @ A``; PEFT saves these, and whatever else was trained, under names that start with those of the modules.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.files import open_source
from mergefs.checkpoint.header import read_header
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint, Shard
from mergefs.checkpoint.weights import ADAPTER_CONFIG_NAME
from mergefs.errors import CheckpointError, SourceReadError, UnsupportedCheckpointError

WEIGHTS_NAME: Final = "adapter_model.safetensors"

_PICKLE_NAME: Final = "adapter_model.bin"
_PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(
    r"(?P<module>.+?)(?P<wrappers>(?:\.base_layer)*)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS: Final = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_SAVED: Final = re.compile(r"(?P<module>.+?)\.(?:modules_to_save\.(?:(?P<adapter>[^.]+)\.)?|base_layer\.)(?P<leaf>.+)")


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module, or of one of its parameters.

    ``a`` has the shape (rank, inputs) and ``b`` (outputs, rank), with the kernel of a convolution behind the inputs;
    ``embedding`` says that the inputs are tokens. ``bias`` and ``magnitude`` (DoRA) hold a value for each output.
    ``depth`` counts the wrappers between the module and the factors: PEFT nests those of several parameters.
    """

    module: str
    embedding: bool
    depth: int
    a: TensorSource
    b: TensorSource
    bias: TensorSource | None
    magnitude: TensorSource | None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The directory of a LoRA adapter.

    ``path`` is absolute and resolved, ``shards`` are the one file of weights, ``settings`` is ``adapter_config.json``.
    ``saved`` are whole tensors by their names in the model, ``tokens`` the rows that replace those of an embedding, by
    module. ``local_identity`` changes whenever one of the files is written to or replaced.
    """

    path: Path
    config: AdapterConfig
    settings: AuxiliaryFile
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorSource]
    factors: tuple[Factors, ...]
    saved: Mapping[str, TensorSource]
    tokens: Mapping[str, TensorSource]
    total_bytes: int
    local_identity: str

    @property
    def checked_files(self) -> tuple[Shard | AuxiliaryFile, ...]:
        """Its weights, and what says how they are meant."""
        return (*self.shards, self.settings)


def open_adapter(path: Path) -> Adapter:
    """Open the adapter in the directory ``path``; reads ``adapter_config.json`` and the header of the weights only.

    Raises CheckpointError when it is missing, incomplete, damaged or contradicts itself, UnsupportedCheckpointError
    for pickles and for adapters that cannot be folded into the weights of a model row by row, and SourceReadError when
    the operating system cannot give its bytes.
    """
    directory = _resolve(path)
    settings_path, weights_path = directory / ADAPTER_CONFIG_NAME, directory / WEIGHTS_NAME
    if not os.path.lexists(settings_path):
        raise CheckpointError(
            f"{directory} has no {ADAPTER_CONFIG_NAME}, so it is no adapter; give the directory that PEFT saved the "
            "adapter to"
        )
    config = read_adapter_config(settings_path)
    if not os.path.lexists(weights_path):
        raise _without_weights(directory)
    with open_source(settings_path) as descriptor:
        settings = AuxiliaryFile(settings_path, Fingerprint.of(os.fstat(descriptor)), ADAPTER_CONFIG_NAME)
    with open_source(weights_path) as descriptor:
        fingerprint = Fingerprint.of(os.fstat(descriptor))
        shard = Shard(weights_path, fingerprint, read_header(descriptor, weights_path))
    tensors = {
        tensor.name: TensorSource(tensor.name, tensor.dtype, tensor.shape, 0, tensor.begin, tensor.end - tensor.begin)
        for tensor in shard.header.tensors
    }
    contents = _sort(weights_path, tensors)
    return Adapter(
        path=directory,
        config=config,
        settings=settings,
        shards=(shard,),
        tensors=tensors,
        factors=contents.complete_factors(weights_path),
        saved=contents.saved,
        tokens=contents.tokens,
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        local_identity=_local_identity(shard, settings),
    )


def _resolve(path: Path) -> Path:
    try:
        directory = Path(path).expanduser().resolve(strict=True)
        is_directory = directory.is_dir()
    except FileNotFoundError as error:
        raise CheckpointError(f"adapter directory {str(path)!r} does not exist; check the path") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceReadError(
            f"adapter directory {str(path)!r} cannot be opened ({reason}); check the path and its permissions"
        ) from error
    if not is_directory:
        raise CheckpointError(
            f"{directory} is a file, not the directory of an adapter; give the directory that holds it"
        )
    return directory


def _without_weights(directory: Path) -> CheckpointError:
    if os.path.lexists(directory / _PICKLE_NAME):
        return UnsupportedCheckpointError(
            f"{directory / _PICKLE_NAME} holds pickled weights, which are refused because unpickling runs code from "
            "the file; load the adapter with PEFT and save_pretrained() it again, as safetensors"
        )
    return CheckpointError(f"{directory} has no {WEIGHTS_NAME}; download the adapter again")


@dataclass(slots=True)
class _Contents:
    """The tensors of an adapter by what they are for; ``parts`` by module, wrappers and the part of the factors."""

    parts: dict[tuple[str, int], dict[str, TensorSource]] = field(default_factory=dict)
    saved: dict[str, TensorSource] = field(default_factory=dict)
    tokens: dict[str, TensorSource] = field(default_factory=dict)

    def complete_factors(self, path: Path) -> tuple[Factors, ...]:
        """Return the factors of every module, of which both must be there and agree in their rank."""
        return tuple(_factors(path, module, depth, parts) for (module, depth), parts in sorted(self.parts.items()))


def _sort(path: Path, tensors: Mapping[str, TensorSource]) -> _Contents:
    """Return what the names of the tensors say that each is for."""
    contents = _Contents()
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        if not tensor.dtype.is_float:
            raise UnsupportedCheckpointError(
                f"{path}: tensor {name!r} is {tensor.dtype.name}, and only floating-point adapters can be applied; "
                "save the adapter again without quantisation"
            )
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{path}: the name of tensor {name!r} does not begin with {_PREFIX!r}, so it is not known which module "
                "it belongs to; save the adapter again with PEFT"
            )
        adapters |= _place(path, name.removeprefix(_PREFIX), tensor, contents)
    if len(adapters) > 1:
        first, second = sorted(adapters)[:2]
        raise CheckpointError(
            f"{path} holds the adapters {first!r} and {second!r}, and one of them can be applied at a time; save each "
            "to a directory of its own with PEFT"
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; save the adapter again with PEFT")
    return contents


def _place(path: Path, name: str, tensor: TensorSource, contents: _Contents) -> set[str]:
    """Put one tensor where it belongs; return the name of the adapter, if it is part of the tensor's."""
    group, key = contents.saved, name
    if ".lora_" in name:
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise UnsupportedCheckpointError(
                f"{path}: tensor {tensor.name!r} belongs to a variant of LoRA that is not known here; fold the adapter "
                "into its model with PEFT's merge_and_unload() and save_pretrained(), and name the result"
            )
        group = contents.parts.setdefault((found["module"], found["wrappers"].count(".")), {})
        key = found["part"] + (".bias" if found["leaf"] == "bias" else "")
    elif found := _TOKENS.fullmatch(name):
        group, key = contents.tokens, found["module"]
    elif found := _SAVED.fullmatch(name):
        key = f"{found['module']}.{found['leaf']}"
    if key in group:
        raise CheckpointError(
            f"{path} holds {group[key].name!r} and {tensor.name!r}, which stand for the same thing; save the adapter "
            "again with PEFT"
        )
    group[key] = tensor
    return {found["adapter"]} - {None} if found else set()


def _factors(path: Path, module: str, depth: int, parts: Mapping[str, TensorSource]) -> Factors:
    """Return the factors of one module from its parts."""
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    missing = next((name for name in names if name not in parts), None)
    surplus = sorted(parts.keys() - {*names, "magnitude_vector", *(() if embedding else ("B.bias",))})
    if missing is not None or surplus:
        what = f"lacks lora_{missing}" if missing else f"has lora_{surplus[0]} where it does not belong"
        raise CheckpointError(f"{path}: module {module!r} {what}; save the adapter again with PEFT")
    a, b = (parts[name] for name in names)
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise CheckpointError(
            f"{path}: the factors of module {module!r} are {list(a.shape)} and {list(b.shape)}, and no product of "
            "them fits a weight; save the adapter again with PEFT, from a model whose parameters are gathered"
        )
    for part in ("B.bias", "magnitude_vector"):
        if part in parts and math.prod(parts[part].shape) != b.shape[0]:
            raise CheckpointError(
                f"{path}: tensor {parts[part].name!r} is {list(parts[part].shape)}, but module {module!r} has "
                f"{b.shape[0]} outputs; save the adapter again with PEFT"
            )
    return Factors(module, embedding, depth, a, b, parts.get("B.bias"), parts.get("magnitude_vector"))


def _local_identity(shard: Shard, settings: AuxiliaryFile) -> str:
    """Return the identity of these files on this machine, for as long as nobody writes to them."""
    digest = blake3(b"mergefs local identity of an adapter 1\n")
    digest.update(shard.header.digest.encode())
    for mark in (shard.fingerprint, settings.fingerprint):
        digest.update(f" {mark.size} {mark.mtime_ns} {mark.ctime_ns} {mark.inode}".encode())
    return f"local-{digest.hexdigest()}"
