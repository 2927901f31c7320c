"""Tensors of whole models, and what it means that they are equal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recipes import write_document
from safetensors.torch import load_file

import mergefs

Tensors = dict[str, torch.Tensor]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_model(directory: Path) -> Tensors:
    """Return the tensors of all weight files in ``directory``, by the reference library."""
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of a tensor, which tell -0.0 from 0.0."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def differing(ours: Tensors, theirs: Tensors) -> dict[str, int]:
    """Return how many elements of each tensor differ in any bit, where some do; the rest must agree anyway."""
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    counts = {name: int((bits(ours[name]) != bits(theirs[name])).sum()) for name in ours}
    return {name: count for name, count in counts.items() if count}


def unit_in_the_last_place(values: torch.Tensor) -> torch.Tensor:
    """Return the spacing of the numbers of the tensor's dtype at each of its values, in float64."""
    information = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp_min(information.tiny))[1] - 1
    return torch.exp2(exponent.double()) * information.eps


def merge_by_mergefs(
    directory: Path, document: Mapping[str, Any] | Sequence[Mapping[str, Any]], **options: Any
) -> Tensors:
    """Return all tensors of the merged model, through ``mergefs.open``."""
    with mergefs.open(write_document(directory / "recipe.yml", document), **options) as model:
        return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)
