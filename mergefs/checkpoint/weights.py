"""Which files of a model directory are its weights."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from mergefs.checkpoint.auxiliary import is_training_leftover
from mergefs.checkpoint.files import list_directory, read_json_object
from mergefs.errors import CheckpointError, UnsupportedCheckpointError

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
ADAPTER_CONFIG_NAME: Final = "adapter_config.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")

_NUMBERED: Final = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]+)-of-(?P<total>[0-9]+)\.safetensors")
_OTHER_FORMATS: Final = {
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
}


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files of a model, by their names relative to its directory, sorted.

    ``index`` says which file holds a tensor, as the model's index file has it; it is None when there is none.
    """

    names: tuple[str, ...]
    index: Mapping[str, str] | None = None


def find_weight_files(directory: Path, present: Sequence[str] | None = None) -> WeightFiles:
    """Return the files that hold the weights of the model in ``directory``.

    ``present`` are the names of its files where not all of them are there yet, but for an index, which must be.

    The index decides where there is one, else ``model.safetensors``, else a complete set of numbered shards, else
    the only safetensors file. Raises UnsupportedCheckpointError for weights in other formats and LoRA adapters,
    CheckpointError for missing or ambiguous weights and a broken index, SourceReadError for an unreadable one.
    """
    present = list_directory(directory) if present is None else present
    if INDEX_NAME in present:
        return _read_index(directory)
    if SINGLE_NAME in present:
        return WeightFiles((SINGLE_NAME,))
    candidates = [
        name
        for name in present
        if name.endswith(".safetensors") and not name.startswith((".", "adapter_")) and not is_training_leftover(name)
    ]
    # Mistral ships its own format beside the one that transformers reads: the same weights under other names.
    candidates = [name for name in candidates if not name.startswith("consolidated")] or candidates
    if not candidates:
        raise _explain_absence(directory, present)
    numbered = [match for match in map(_NUMBERED.fullmatch, candidates) if match]
    if len(numbered) == len(candidates):
        return WeightFiles(_check_set(directory, numbered))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{directory} holds {_enumerate(candidates)}, but no {INDEX_NAME} that says which of them are the model; "
            "add the index or move the others away"
        )
    return WeightFiles((candidates[0],))


def is_adapter(directory: Path) -> bool:
    """Return whether ``directory`` is that of an adapter, without the weights of a model beside it."""
    if not os.path.lexists(directory / ADAPTER_CONFIG_NAME):
        return False
    try:
        find_weight_files(directory)
    except CheckpointError:
        return True
    return False


def _read_index(directory: Path) -> WeightFiles:
    path = directory / INDEX_NAME
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map that says which file holds which tensor; download this file again"
        )
    index: dict[str, str] = {}
    for tensor, file_name in weight_map.items():
        index[tensor] = _check_file_name(path, tensor, file_name)
    return WeightFiles(tuple(sorted(set(index.values()))), index)


def _check_file_name(index_path: Path, tensor: str, file_name: object) -> str:
    """Return the name of a shard, relative to the model directory and in normal form."""
    if not isinstance(file_name, str) or not file_name:
        raise CheckpointError(
            f"{index_path} maps tensor {tensor!r} to {file_name!r}, which is no file name; repair the index"
        )
    relative = PurePosixPath(file_name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in file_name:
        raise CheckpointError(
            f"{index_path} maps tensor {tensor!r} to {file_name!r}, which is outside the model directory; "
            "move the file into it and repair the index"
        )
    if relative.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(index_path.parent, file_name)
    return str(relative)


def _check_set(directory: Path, numbered: Sequence[re.Match[str]]) -> tuple[str, ...]:
    """Return the names of numbered shards, of which none is missing."""
    sets: defaultdict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for match in numbered:
        sets[match["prefix"], int(match["total"])][int(match["number"])] = match.string
    if len(sets) > 1:
        examples = [next(iter(members.values())) for members in sets.values()]
        raise CheckpointError(
            f"{directory} holds shards of {len(sets)} models ({_enumerate(examples)}); move all but one away"
        )
    ((prefix, total), members) = next(iter(sets.items()))
    wrong = [name for number, name in members.items() if not 1 <= number <= total]
    if wrong or len(members) != len(numbered):
        culprit = wrong[0] if wrong else numbered[0].string
        raise CheckpointError(
            f"{directory / culprit} does not fit into a set of {total} shards; rename it or move it away"
        )
    missing = next((number for number in range(1, total + 1) if number not in members), None)
    if missing is not None:
        raise CheckpointError(
            f"{directory} lacks {prefix}-{missing:05d}-of-{total:05d}.safetensors and has {len(members)} of {total} "
            "shards; download the missing ones"
        )
    return tuple(sorted(members.values()))


def _explain_absence(directory: Path, present: Sequence[str]) -> CheckpointError:
    """Return the error for a directory without safetensors weights of a model, with what it has instead."""
    pickles = [
        name
        for name in present
        if name.endswith(PICKLE_SUFFIXES) and not name.startswith("adapter_") and not is_training_leftover(name)
    ]
    adapters = [name for name in present if name.startswith("adapter_")]
    if pickles:
        return _pickle_error(directory, pickles[0])
    if adapters:
        return UnsupportedCheckpointError(
            f"{directory} holds an adapter ({adapters[0]}) and not the weights of a model; give the model that it "
            "belongs to with the adapter after a plus sign, as MODEL+ADAPTER"
        )
    for name in present:
        form = next((form for suffix, form in _OTHER_FORMATS.items() if name.endswith(suffix)), None)
        if form is not None:
            return UnsupportedCheckpointError(
                f"{directory / name} holds weights in {form} form, which cannot be merged; "
                "use the safetensors files of the original model"
            )
    nested = sorted({str(path.parent) for depth in ("*", "snapshots/*") for path in _safetensors(directory, depth)})
    hint = f"; did you mean {_enumerate(nested)}?" if nested else "; download the model's safetensors files"
    return CheckpointError(f"{directory} holds no weights (no *.safetensors file){hint}")


def _safetensors(directory: Path, depth: str) -> list[Path]:
    return sorted(directory.glob(f"{depth}/*.safetensors"))


def _pickle_error(directory: Path, name: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{directory / name} holds pickled weights, which are refused because unpickling runs code from the file; "
        "convert the model to safetensors with AutoModelForCausalLM.from_pretrained(MODEL)"
        ".save_pretrained(OUTPUT, safe_serialization=True) of transformers"
    )


def _enumerate(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
