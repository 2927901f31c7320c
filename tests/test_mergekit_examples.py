"""The example configs of mergekit's repository: those that mergekit 0.1.5 runs give the same model here.

They are written down here in their structure, with small models in the place of those that they name; the small models
have as many layers as the ranges of the examples need.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from oracle import mergekit_merge, mergekit_multi, nothing_left_to_chance
from tensors import differing, merge_by_mergefs

from mergefs.errors import RecipeError

LAYERS = 40
GRADIENTS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("examples")
    return family(directory, experts=3, dtype=torch.float16, tied=False, shards=1, layers=LAYERS, hidden=16)


def entry(model: Path, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "parameters": parameters} if parameters else {"model": str(model)}


def linear(models: Family) -> dict[str, Any]:
    first, second, third = models.experts
    entries = [entry(first, weight=1.0), entry(second, weight=0.3), entry(third, weight=0.5)]
    return {"models": entries, "merge_method": "linear", "dtype": "float16"}


def gradient_slerp(models: Family) -> dict[str, Any]:
    first, second, _ = models.experts
    sources = [{"model": str(model), "layer_range": [0, LAYERS]} for model in (first, second)]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": str(first),
        "parameters": {"t": GRADIENTS},
        "dtype": "float16",
    }


def orcamini_platy(models: Family) -> dict[str, Any]:
    first, second, _ = models.experts
    ranges = [(first, [0, 24]), (second, [20, 40])]
    slices = [{"sources": [{"model": str(model), "layer_range": layers}]} for model, layers in ranges]
    return {"slices": slices, "merge_method": "passthrough", "dtype": "float16"}


def ties(models: Family) -> dict[str, Any]:
    first, second, third = models.experts
    return {
        "models": [
            entry(first, density=[1, 0.7, 0.1], weight=1.0),
            entry(second, density=0.5, weight=[0, 0.3, 0.7, 1]),
            entry(third, density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "merge_method": "ties",
        "base_model": str(models.base),
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
    }


def bio_merge(models: Family) -> dict[str, Any]:
    first, second, _ = models.experts
    return {
        "models": [entry(first, density=0.5, weight=0.5), entry(second, density=0.5, weight=0.5)],
        "merge_method": "ties",
        "base_model": str(models.base),
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "float16",
    }


def arcee_fusion(models: Family) -> dict[str, Any]:
    first, second, _ = models.experts
    return {
        "models": [entry(first), entry(second)],
        "merge_method": "arcee_fusion",
        "base_model": str(first),
        "dtype": "bfloat16",
        "out_dtype": "bfloat16",
    }


@pytest.mark.parametrize("example", [linear, gradient_slerp, orcamini_platy, ties, bio_merge, arcee_fusion])
def test_an_example_gives_the_same_model_as_mergekit(models: Family, tmp_path: Path, example: Any) -> None:
    document = example(models)
    with nothing_left_to_chance(document["merge_method"]):
        theirs = mergekit_merge(document)
    assert differing(merge_by_mergefs(tmp_path, document), theirs) == {}


def mega(models: Family) -> list[dict[str, Any]]:
    """Return two documents that are tied together by ``out_path``, as mergekit-mega read them."""
    result = "./models/gradient-slerp"
    second = {
        **ties(models),
        "models": [
            {"model": result, "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            entry(models.experts[2], density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "out_path": "./models/gradient-slerp-ties",
    }
    return [{**gradient_slerp(models), "out_path": result}, second]


def test_an_example_of_two_steps_gives_the_same_model_as_mergekit(models: Family, tmp_path: Path) -> None:
    # mergekit 0.1.5 has names in the place of paths, and takes the document without one for the result.
    first, second = ({key: value for key, value in one.items() if key != "out_path"} for one in mega(models))
    second["models"][0]["model"] = "gradient-slerp"
    with nothing_left_to_chance("ties"), nothing_left_to_chance("slerp"):
        theirs = mergekit_multi([{**first, "name": "gradient-slerp"}, second])
    assert differing(merge_by_mergefs(tmp_path, mega(models)), theirs) == {}


# Examples of methods and forms that mergekit 0.1.5 does not have, from forks or from before


def refused(models: Family, tmp_path: Path, document: Mapping[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        merge_by_mergefs(tmp_path, document)
    return str(caught.value)


@pytest.mark.parametrize(
    "method", ["cabs", "chipalign", "core_space", "lrp", "zipit", "ranked_ties", "encoder_decoder_weighted"]
)
def test_a_method_that_mergekit_does_not_have_is_refused(models: Family, tmp_path: Path, method: str) -> None:
    assert f"'{method}' is not a merge_method" in refused(models, tmp_path, {**linear(models), "merge_method": method})


def test_a_filter_that_is_called_pattern_is_refused(models: Family, tmp_path: Path) -> None:
    document = gradient_slerp(models)
    document["parameters"] = {"t": [{"pattern": "self_attn", "value": 0.5}, {"value": 0.3}]}
    assert "'pattern' is not a key of a condition of 't'; a condition has 'filter' and 'value'" in refused(
        models, tmp_path, document
    )


def test_an_adapter_beside_a_model_is_refused(models: Family, tmp_path: Path) -> None:
    document = linear(models)
    document["models"][0]["lora"] = "user/adapter"
    assert "write `model: PATH+ADAPTER`" in refused(models, tmp_path, document)


def test_slerp_with_weights_in_the_place_of_t_is_refused(models: Family, tmp_path: Path) -> None:
    document = {**linear(models), "merge_method": "slerp", "base_model": str(models.base)}
    assert "'weight' is a parameter of" in refused(models, tmp_path, document)
