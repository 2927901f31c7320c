"""Example configs of mergekit's repository for other models than Llama: their structure, with small models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FLORENCE2, GPT2, QWEN2_VL, WHISPER, Architecture, make_model
from checkpoints import Family, fine_tuned, write_model
from oracle import mergekit_merge, mergekit_multi, nothing_left_to_chance
from tensors import differing, load_model, merge_by_mergefs


def family_of(directory: Path, architecture: Architecture, experts: int = 2) -> Family:
    """Write a model and fine-tuned versions of it, in bfloat16."""
    config, base = make_model(architecture, torch.bfloat16)
    paths = [write_model(directory / "base", base, config)]
    for number in range(experts):
        tensors = fine_tuned(base, torch.bfloat16, seed=number + 1, frozen=())
        paths.append(write_model(directory / f"expert-{number}", tensors, config))
    return Family(paths[0], tuple(paths[1:]))


def entry(model: Path | str, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "parameters": parameters}


def test_the_first_layers_of_a_gpt2_are_those_of_mergekit(tmp_path: Path) -> None:
    """gpt2-small.yml: its number of layers is ``n_layer`` in config.json."""
    models = family_of(tmp_path, GPT2, experts=0)
    document = {
        "slices": [{"sources": [{"model": str(models.base), "layer_range": [0, 8]}]}],
        "merge_method": "passthrough",
        "dtype": "float16",
    }
    ours = merge_by_mergefs(tmp_path, document)
    assert {name.split(".")[2] for name in ours if ".h." in name} == {str(number) for number in range(8)}
    assert differing(ours, mergekit_merge(document)) == {}


def test_a_model_of_several_towers_is_merged_by_gradients_as_by_mergekit(tmp_path: Path) -> None:
    """vlm-ties.yml: Florence-2, which mergekit has no list of and takes apart by itself."""
    models = family_of(tmp_path, FLORENCE2)
    document = {
        "models": [
            entry(models.experts[0], density=[1, 0.7, 0.1], weight=1.0),
            entry(models.base, density=0.5, weight=[0, 0.3, 0.7, 1]),
        ],
        "merge_method": "ties",
        "base_model": str(models.base),
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
    }
    with nothing_left_to_chance("ties"):
        theirs = mergekit_merge(document)
    assert differing(merge_by_mergefs(tmp_path, document), theirs) == {}


@pytest.mark.parametrize("architecture", [QWEN2_VL, WHISPER], ids=["vlm-linear.yml", "whisper"])
def test_a_linear_merge_of_what_mergekit_cannot_read_here_is_the_average(
    tmp_path: Path, architecture: Architecture
) -> None:
    """mergekit's own lists of these two do not fit what transformers 5 and they themselves say of the models."""
    models = family_of(tmp_path, architecture, experts=1)
    document = {
        "models": [entry(models.base, weight=1.0), entry(models.experts[0], weight=1.0)],
        "merge_method": "linear",
        "dtype": "float32",
    }
    first, second = load_model(models.base), load_model(models.experts[0])
    expected = {name: (first[name].float() + second[name].float()) / 2 for name in first}
    assert differing(merge_by_mergefs(tmp_path, document), expected) == {}


def test_three_steps_give_the_same_model_as_mergekit(tmp_path: Path) -> None:
    """The example of mergekit-multi's documentation: each step merges the result of the one before."""
    models = family_of(tmp_path, GPT2.with_settings(n_layer=3), experts=4)
    first = {
        "name": "first-merge",
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in models.experts[:2]],
        "parameters": {"weight": 0.5},
    }
    second = {
        "name": "second-merge",
        "merge_method": "slerp",
        "base_model": "first-merge",
        "models": [{"model": str(models.experts[2])}],
        "parameters": {"t": 0.5},
    }
    third = {
        "merge_method": "dare_ties",
        "base_model": str(models.base),
        "models": [entry("second-merge", density=0.6, weight=0.5), entry(models.experts[3], density=0.8, weight=0.5)],
    }
    with nothing_left_to_chance("slerp"), nothing_left_to_chance("dare_ties"):
        theirs = mergekit_multi([first, second, third])
    assert differing(merge_by_mergefs(tmp_path, [first, second, third]), theirs) == {}
