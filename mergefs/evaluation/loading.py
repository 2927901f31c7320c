"""Merged models, loaded into transformers without a mount and without a copy on disk."""

import json
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergefs.api import MergedModel, open_model
from mergefs.engine.ahead import in_order
from mergefs.errors import EvaluationError
from mergefs.evaluation.devices import choose_device
from mergefs.evaluation.imports import import_transformers
from mergefs.processors import usable_processors

_CONFIGURATION = "config.json"
_SUFFIX = re.compile(r"\.ya?ml(?=@|$)")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be run, in evaluation mode, and what it took to load it.

    ``title`` names it for people. ``plan_id`` and the bytes are None for a model that lies on disk.
    """

    title: str
    model: Any
    tokenizer: Any
    plan_id: str | None = None
    expert_bytes_read: int | None = None
    predicted_relative_error: float | None = None


def load_state_dict(
    recipe: str | Path, *, device: "str | torch.device" = "cpu", **options: Any
) -> dict[str, torch.Tensor]:
    """Return every tensor of the merged model on ``device``, as a model's ``load_state_dict`` takes them.

    ``options`` are those of ``mergefs.open``. With transformers, which never sees a directory of weights then:
    ``LlamaForCausalLM.from_pretrained(None, config=config, state_dict=mergefs.load_state_dict("merge.yml"))``. Raises
    EvaluationError, before anything is merged, for a device that is not there.
    """
    place = choose_device(str(device))
    with open_model(recipe, **options) as merged:
        return _tensors(merged, place)


def load_model(source: Path, dtype: str = "float32", device: str = "cpu", **options: Any) -> LoadedModel:
    """Return the model that ``source`` is: a recipe or a plan's id, merged as it is read, or a directory.

    It runs in ``dtype``, which torch has, whatever its weights are in, and on ``device`` (see ``choose_device``).
    ``options`` are those of ``mergefs.open``. Raises EvaluationError where transformers does not know the architecture,
    or a tokenizer or the device is missing, and MissingDependencyError without transformers.
    """
    transformers = import_transformers()
    place, precision = choose_device(device), getattr(torch, dtype)
    if source.is_dir():
        model, tokenizer = _from_directory(source, source.name, None, precision, transformers)
        return LoadedModel(source.name, model.to(place), tokenizer)
    with open_model(source, **options) as merged, tempfile.TemporaryDirectory() as directory:
        for name, size in merged.files.sizes.items():
            if not merged.files.is_merged(name):
                path = Path(directory) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(merged.read_file(name, 0, size))
        tensors = _tensors(merged, torch.device("cpu"))
        title = _SUFFIX.sub("", source.name)
        model, tokenizer = _from_directory(Path(directory), title, tensors, precision, transformers)
        return LoadedModel(
            title,
            model.to(place),
            tokenizer,
            merged.plan.plan_id,
            merged.bytes_read["expert_bytes_read"],
            merged.plan.outcome.predicted_relative_error,
        )


def _tensors(merged: MergedModel, device: torch.device) -> dict[str, torch.Tensor]:
    """Return every tensor on ``device``; a few at a time are merged, on all cores, before they are moved there."""
    names, workers = merged.keys(), max(2, usable_processors())
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        found = in_order(pool, lambda name: merged.get_tensor(name).to(device), names, workers)
        return dict(zip(names, found, strict=True))


def _from_directory(
    directory: Path,
    title: str,
    tensors: Mapping[str, torch.Tensor] | None,
    dtype: torch.dtype,
    transformers: Any,
) -> tuple[Any, Any]:
    """Return model and tokenizer; ``tensors`` are the weights where the directory does not hold them."""
    architecture = _architecture(directory, title)
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise EvaluationError(
            f"{title}: transformers {transformers.__version__} has no class {architecture}; install a version that "
            "has it"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        if tensors is None:
            model = kind.from_pretrained(directory, dtype=dtype)
        else:
            model = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"{title}: transformers cannot load it ({reason}); give a model with config.json and a tokenizer"
        ) from error
    return model.eval(), tokenizer


def _architecture(directory: Path, title: str) -> str:
    """Return the name of the class that config.json names."""
    try:
        found = json.loads((directory / _CONFIGURATION).read_bytes())["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, str):
        raise EvaluationError(f"{title}: config.json names no architecture; add `architectures` to the base's")
    return found
