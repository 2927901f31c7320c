"""Example configs that mergekit 0.1.5 does not run, or runs as something else: each is refused in one sentence.

They come from its repository and its forks: methods that never became a part of it, keys of other programs, and keys
that it passes over without a word.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from recipes import write_document
from sentences import mergekit_refuses, refusal_of_plan


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("refusals")
    return family(directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1)


def entries(models: Family, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": str(path), "parameters": dict(parameters)} for path in models.experts]


def cabs(models: Family) -> dict[str, Any]:
    return {
        "models": [{"model": str(models.base)}, *entries(models, weight=0.6, n_val=8, m_val=32)],
        "merge_method": "cabs",
        "default_n_val": 8,
        "default_m_val": 32,
        "pruning_order": [str(path) for path in models.experts],
        "base_model": str(models.base),
        "dtype": "bfloat16",
    }


def chipalign(models: Family) -> dict[str, Any]:
    return {
        "models": [{"model": str(path)} for path in models.experts],
        "merge_method": "nuslerp",
        "parameters": {"geodesic": True, "lambda": 0.5, "nuslerp_flatten": True},
        "tokenizer": {"source": "union"},
        "dtype": "bfloat16",
    }


def core_space(models: Family) -> dict[str, Any]:
    both = [{"model": str(models.base), "parameters": {"weight": weight}} for weight in (0.5, 1.0)]
    return {"models": both, "merge_method": "core_space", "base_model": str(models.base), "dtype": "float32"}


def lrp(models: Family) -> dict[str, Any]:
    return {
        "merge_method": "lrp",
        "base_model": str(models.base),
        "parameters": {"density": 0.7},
        "models": entries(models, weight=1.0),
        "dtype": "float16",
    }


def zipit(models: Family) -> dict[str, Any]:
    return {
        "models": entries(models, density=0.5, weight=[0, 0.3, 0.7, 1]),
        "merge_method": "ties",
        "base_model": str(models.base),
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
        "align_weights": "zipit",
    }


def ranked_ties(models: Family) -> dict[str, Any]:
    return {
        "models": entries(models, density=[0.8, 0.3, 0.1], weight=[1.0, 0.8, 0.5]),
        "merge_method": "ranked_ties",
        "base_model": str(models.base),
        "parameters": None,
        "dtype": "bfloat16",
    }


def metrics(models: Family) -> dict[str, Any]:
    listed = [{"model": str(path)} for path in models.experts]
    return {"models": listed, "metric_method": "all", "parameters": {"intra_model_metrics": True}, "dtype": "float32"}


def linear_small(models: Family) -> dict[str, Any]:
    listed = [{"model": str(path)} for path in models.experts]
    return {"models": listed, "metric_method": "scale", "dtype": "float32"}


def evolved(models: Family) -> dict[str, Any]:
    genome = {"models": [str(path) for path in models.experts], "merge_method": "dare_ties"}
    return {"genome": genome, "tasks": [{"name": "sst2_pt", "weight": 1.0, "metric": "acc,none"}]}


def old_gradient(models: Family) -> dict[str, Any]:
    sources = [{"model": str(path), "layer_range": [0, 2]} for path in models.experts]
    t = [
        {"pattern": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"pattern": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": str(models.experts[0]),
        "parameters": {"t": t},
        "dtype": "float16",
    }


def encoder_decoder(models: Family) -> dict[str, Any]:
    return {
        "merge_method": "encoder_decoder_weighted",
        "models": entries(models, encoder_weight=0.8, decoder_weight=0.3),
    }


def whisper_adapters(models: Family) -> dict[str, Any]:
    listed = [
        {"model": str(models.base), "lora": f"user/{language}", "parameters": {"weight": 0.5}}
        for language in ("french", "german")
    ]
    return {"models": listed, "merge_method": "slerp"}


def multilingual(models: Family) -> dict[str, Any]:
    return {"models": entries(models, weight=0.7), "merge_method": "slerp"}


# Whether mergekit refuses it too, or passes over what it does not know.
EXAMPLES = {
    cabs: ("'cabs' is not a merge_method", True),
    chipalign: ("'geodesic' is not a parameter of nuslerp", True),
    core_space: ("'core_space' is not a merge_method", True),
    lrp: ("'lrp' is not a merge_method", True),
    zipit: ("'align_weights' is not a key of a recipe", False),
    ranked_ties: ("'ranked_ties' is not a merge_method", True),
    metrics: ("'metric_method' is not a key of a recipe; did you mean 'merge_method'?", True),
    linear_small: ("'metric_method' is not a key of a recipe; did you mean 'merge_method'?", True),
    evolved: ("'genome' is not a key of a recipe", True),
    old_gradient: ("'pattern' is not a key of a condition of 't'; a condition has 'filter' and 'value'", False),
    encoder_decoder: ("'encoder_decoder_weighted' is not a merge_method", True),
    whisper_adapters: ("merge_method slerp needs a base model", True),
    multilingual: ("merge_method slerp needs a base model", True),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_an_example_that_mergekit_does_not_run_is_refused_in_one_sentence(
    models: Family, tmp_path: Path, example: Any
) -> None:
    words, refused_by_mergekit = EXAMPLES[example]
    document = example(models)
    assert mergekit_refuses(document) is refused_by_mergekit
    recipe = write_document(tmp_path / "recipe.yml", document)
    sentence = refusal_of_plan(recipe)
    assert words in sentence
    assert sentence.startswith(f"{recipe}:")
