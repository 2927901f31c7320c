"""The files of a model directory that belong to the model beside its weights.

What is not known to be something else is kept: tokenizers, processors, custom code and licences come under many
names, and a model that lacks one of them does not load.
"""

import logging
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint
from mergefs.errors import CheckpointError, SourceReadError
from mergefs.units import format_size

_LOG: Final = logging.getLogger(__name__)

LARGEST_UNKNOWN_BYTES: Final = 64 << 20
"""Files of unknown kinds above this size are taken for weights or data and left out."""

KNOWN_SUFFIXES: Final = frozenset(
    (".json", ".jinja", ".txt", ".py", ".model", ".spm", ".bpe", ".vocab", ".merges", ".tiktoken", ".md", ".yaml")
)
_WEIGHTS: Final = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.tflite"),
    *("*.ot", "*.nemo", "*.pdparams", "*.npz"),
)
_INDEX_FILES: Final = ("*.index.json",)
TRAINING_LEFTOVERS: Final = (
    *("optimizer.*", "scheduler.pt", "rng_state*", "trainer_state.json", "training_args.bin", "global_step*"),
    "zero_to_fp32.py",
)
LEFT_OUT_DIRECTORIES: Final = ("__pycache__", "checkpoint-*", "global_step*", "runs", "original")
# A mount writes its own, and an adapter's description would make transformers look for the adapter's weights.
_LEFT_OUT_AT_TOP: Final = frozenset(
    {"README.md", "mergekit_config.yml", "mergefs.json", "mergefs.manifest.json", "adapter_config.json"}
)


def is_training_leftover(name: str) -> bool:
    """Return whether the file ``name`` is what trainers leave in a model directory (optimizer state and such)."""
    return _matches(name, TRAINING_LEFTOVERS)


def find_auxiliary_files(directory: Path) -> tuple[AuxiliaryFile, ...]:
    """Return the files below ``directory`` that belong to the model beside its weights, sorted by name.

    Links to files are followed (the Hugging Face cache is made of them), links to directories are not. Raises
    CheckpointError for a link to nothing, SourceReadError when a directory or file cannot be looked at.
    """
    return tuple(sorted(_walk(directory, ""), key=lambda file: file.name))


def _walk(directory: Path, prefix: str) -> Iterator[AuxiliaryFile]:
    try:
        with os.scandir(directory) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceReadError(f"{directory} cannot be listed ({error.strerror}); check that you may read it") from error
    for entry in children:
        name = entry.name
        if name.startswith(".") or (not prefix and name in _LEFT_OUT_AT_TOP):
            continue
        if entry.is_dir(follow_symlinks=False):
            if not _matches(name, LEFT_OUT_DIRECTORIES):
                yield from _walk(directory / name, f"{prefix}{name}/")
        elif not _matches(name, (*_WEIGHTS, *_INDEX_FILES, *TRAINING_LEFTOVERS)):
            file = _examine(directory / name, f"{prefix}{name}")
            if file is not None:
                yield file


def _examine(path: Path, name: str) -> AuxiliaryFile | None:
    """Return the file at ``path``, or None when it is no regular file or too large to be a companion of weights."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is a link to a file that does not exist; download the model again, or delete the link"
        ) from error
    except OSError as error:
        raise SourceReadError(f"{path} cannot be read ({error.strerror}); check that you may read it") from error
    if not stat.S_ISREG(status.st_mode):
        return None
    if status.st_size > LARGEST_UNKNOWN_BYTES and path.suffix.lower() not in KNOWN_SUFFIXES:
        _LOG.warning("%s (%s) is left out: too large for a file beside weights", path, format_size(status.st_size))
        return None
    return AuxiliaryFile(path, Fingerprint.of(status), name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
