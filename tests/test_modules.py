"""Models of several modules, such as a text decoder beside a vision tower: merged as mergekit merges them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_model
from oracle import mergekit_merge, nothing_left_to_chance
from recipes import write_document
from tensors import Tensors, differing, merge_by_mergefs

import mergefs
from mergefs.errors import RecipeError
from mergefs.recipe.layers import layer_stacks

LAYERS, DEPTH = 4, 3

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "dtype": "float32",
    "tie_word_embeddings": False,
    "num_hidden_layers": LAYERS,
    "vocab_size": 48,
    "text_config": {
        "model_type": "qwen2_vl_text",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 48,
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 10000.0, "rope_type": "default"},
    },
    "vision_config": {
        "model_type": "qwen2_vl_vision",
        "depth": DEPTH,
        "embed_dim": 8,
        "hidden_size": 16,
        "num_heads": 2,
    },
}


def tensors_of(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (48, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (48, 16),
        "visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
        "visual.merger.ln_q.weight": (8,),
        "visual.merger.ln_q.bias": (8,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 16), ("k", 8), ("v", 8)):
            shapes |= {
                f"{prefix}.self_attn.{name}_proj.weight": (rows, 16),
                f"{prefix}.self_attn.{name}_proj.bias": (rows,),
            }
        shapes |= {f"{prefix}.self_attn.o_proj.weight": (16, 16), f"{prefix}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    for layer in range(DEPTH):
        prefix = f"visual.blocks.{layer}"
        for name, rows, columns in (("attn.qkv", 24, 8), ("attn.proj", 8, 8), ("mlp.fc1", 16, 8), ("mlp.fc2", 8, 16)):
            shapes |= {f"{prefix}.{name}.weight": (rows, columns), f"{prefix}.{name}.bias": (rows,)}
        shapes |= {f"{prefix}.norm{number}.{kind}": (8,) for number in (1, 2) for kind in ("weight", "bias")}
    for number in (0, 2):
        shapes |= {f"visual.merger.mlp.{number}.weight": (16, 16), f"visual.merger.mlp.{number}.bias": (16,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("modules")
    first, second = (write_model(directory / str(seed), tensors_of(seed), CONFIG) for seed in (1, 2))
    return str(first), str(second)


def assert_equal(directory: Path, document: Mapping[str, Any]) -> Tensors:
    with nothing_left_to_chance(document["merge_method"]):
        theirs = mergekit_merge(document)
    ours = merge_by_mergefs(directory, document)
    assert differing(ours, theirs) == {}
    return ours


def config_of(directory: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    with mergefs.open(write_document(directory / "config-recipe.yml", document)) as model:
        config: dict[str, Any] = json.loads(model.read_file("config.json"))
        return config


def weighted(models: tuple[str, str], *weights: Any) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": {"weight": weight}} for model, weight in zip(models, weights, strict=True)]


def test_whole_models_are_merged_with_all_their_modules(models: tuple[str, str], tmp_path: Path) -> None:
    # A gradient runs over the layers of each module for itself.
    document = {"merge_method": "linear", "models": weighted(models, [0.2, 0.8, 0.5], 1.0), "dtype": "float32"}
    assert_equal(tmp_path, document)


def test_modules_have_models_and_parameters_of_their_own(models: tuple[str, str], tmp_path: Path) -> None:
    document = {
        "merge_method": "ties",
        "base_model": models[0],
        "modules": {
            "text_decoder": {"models": [{"model": models[1], "parameters": {"weight": 0.5, "density": [0.3, 0.9]}}]},
            "vision_tower": {"models": [{"model": models[1]}], "parameters": {"weight": 0.2, "density": 0.5}},
            "multi_modal_projector": {"models": [{"model": models[1], "parameters": {"weight": 1.0}}]},
        },
    }
    assert_equal(tmp_path, document)


def stacked(models: tuple[str, str]) -> dict[str, Any]:
    first, second = models

    def slices(*ranges: tuple[str, int, int]) -> list[dict[str, Any]]:
        return [{"sources": [{"model": model, "layer_range": [start, stop]}]} for model, start, stop in ranges]

    return {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": {"slices": slices((first, 0, 3), (second, 1, 4))},
            "vision_tower": {"slices": slices((second, 0, 2), (first, 1, 3))},
            "multi_modal_projector": {"models": [{"model": first}]},
        },
    }


def test_each_module_is_stacked_for_itself_and_counted_in_its_section_of_the_config(
    models: tuple[str, str], tmp_path: Path
) -> None:
    ours = assert_equal(tmp_path, stacked(models))
    assert {name.split(".")[2] for name in ours if name.startswith("model.layers.")} == set("012345")
    assert {name.split(".")[2] for name in ours if name.startswith("visual.blocks.")} == set("0123")
    config = config_of(tmp_path, stacked(models))
    assert config["text_config"]["num_hidden_layers"] == 6
    assert config["text_config"]["layer_types"] == ["full_attention"] * 6
    assert config["vision_config"]["depth"] == 4


def test_slices_of_a_model_with_several_stacks_of_layers_need_modules(models: tuple[str, str], tmp_path: Path) -> None:
    # The stack that has as many layers as config.json says is meant where only one has.
    sources = [{"model": models[0], "layer_range": [0, 2]}]
    document = {"merge_method": "passthrough", "slices": [{"sources": sources}]}
    merged = merge_by_mergefs(tmp_path, document)
    assert {name.split(".")[2] for name in merged if name.startswith("model.layers.")} == set("01")
    assert {name.split(".")[2] for name in merged if name.startswith("visual.blocks.")} == set("012")


def test_slices_that_could_be_cut_from_two_stacks_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["num_hidden_layers"] = config["text_config"]["num_hidden_layers"] = 7
    odd = write_model(tmp_path / "odd", tensors_of(3), config)
    sources = [{"model": str(odd), "layer_range": [0, 2]}]
    with pytest.raises(
        RecipeError, match=r"several stacks of layers \(model\.layers, visual\.blocks\).*under 'modules'"
    ):
        merge_by_mergefs(tmp_path, {"merge_method": "passthrough", "slices": [{"sources": sources}]})


@pytest.mark.parametrize(
    ("names", "number_of_layers", "stacks"),
    [
        (["model.layers.0.w", "model.layers.1.w", "model.norm.w"], 2, {"model.layers": 2}),
        (["h.0.w", "h.1.experts.5.w"], None, {"h": 2}),
        (
            ["text.layers.0.w", "text.layers.1.w", "vision.0.a", "vision.0.b", "vision.0.c"],
            2,
            {"text.layers": 2, "vision": 1},
        ),
        (["text.0.w", "vision.0.a", "vision.0.b"], 9, {"vision": 1, "text": 1}),
        (["model.layers.0.w", "model.layers.1.w", "model.layers.2.speculative"], 2, {"model.layers": 2}),
        (["merger.mlp.0.w", "merger.mlp.2.w", "blocks.0.w"], None, {"blocks": 1}),
        (["wte.w"], 4, {}),
    ],
)
def test_stacks_of_layers_are_found_in_names_the_main_one_first(
    names: list[str], number_of_layers: int | None, stacks: dict[str, int]
) -> None:
    assert list(layer_stacks(names, number_of_layers).items()) == list(stacks.items())
