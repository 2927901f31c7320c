"""Which tensors of a model an adapter changes: everything in it must find its place, or the module is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import write_adapter

from mergefs.checkpoint.adapter import open_adapter
from mergefs.checkpoint.adapter_fit import Fit, LowRank, SavedTensor, fit_adapter
from mergefs.checkpoint.adapter_names import Outline
from mergefs.errors import CheckpointError, UnsupportedCheckpointError

LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (96, 32),
    f"{LAYER}.self_attn.q_proj.weight": (32, 32),
    f"{LAYER}.self_attn.q_proj.bias": (32,),
    f"{LAYER}.mlp.down_proj.weight": (32, 64),
    f"{LAYER}.input_layernorm.weight": (32,),
    "lm_head.weight": (96, 32),
}


def pair(module: str, rank: int = 2, inputs: int = 32, outputs: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, inputs),
        f"{module}.lora_B.weight": torch.ones(outputs, rank),
    }


def embedding(module: str, tokens: int = 96, width: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_embedding_A": torch.ones(2, tokens),
        f"{module}.lora_embedding_B": torch.ones(width, 2),
    }


def fit(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    model_type: str = "llama",
    tied: bool = False,
    **config: Any,
) -> Fit:
    adapter = open_adapter(write_adapter(directory, tensors, **config))
    return fit_adapter(adapter, Outline("/models/base", shapes, {"model_type": model_type}, tied))


def low_rank(found: Fit, name: str) -> LowRank:
    (change,) = found.changes[name]
    assert isinstance(change, LowRank)
    return change


Q = f"{LAYER}.self_attn.q_proj"
DOWN = f"{LAYER}.mlp.down_proj"


# What finds its place


def test_factors_belong_to_the_weight_of_their_module(tmp_path: Path) -> None:
    found = fit(tmp_path, pair(Q) | pair(DOWN, inputs=64) | {f"{Q}.lora_B.bias": torch.ones(32)})
    assert set(found.changes) == {f"{Q}.weight", f"{Q}.bias", f"{DOWN}.weight"}
    change = low_rank(found, f"{DOWN}.weight")
    assert (change.rows, change.columns, change.rank, change.scaling) == (32, 64, 2, 2.0)
    assert not change.inputs_first
    assert found.untied is None


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", {}, False),
        ("gpt2", {}, True),  # its layers are Conv1D, whatever the file says
        ("none", {"fan_in_fan_out": True}, True),
    ],
)
def test_a_square_weight_lies_as_the_architecture_has_it(
    tmp_path: Path, model_type: str, config: dict[str, Any], expected: bool
) -> None:
    found = fit(tmp_path, pair(Q), model_type=model_type, **config)
    assert low_rank(found, f"{Q}.weight").inputs_first is expected


def test_other_weights_lie_as_their_shapes_say(tmp_path: Path) -> None:
    shapes = {"h.0.attn.c_attn.weight": (32, 96), "h.0.mlp.c_fc.weight": (64, 32)}
    tensors = pair("h.0.attn.c_attn", outputs=96) | pair("h.0.mlp.c_fc", outputs=64)
    found = fit(tmp_path, tensors, shapes, fan_in_fan_out=True)
    assert low_rank(found, "h.0.attn.c_attn.weight").inputs_first
    assert not low_rank(found, "h.0.mlp.c_fc.weight").inputs_first


SPELLINGS = {
    "the same": ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    "a model without its head": ("transformer.h.0.attn.c_proj", "h.0.attn.c_proj"),
    "LLaVA, Gemma 3": ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
    "its vision": ("model.vision_tower.layers.0.fc1", "vision_tower.layers.0.fc1"),
    "its head": ("lm_head", "language_model.lm_head"),
    "Qwen2-VL": ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    "Qwen2-VL's vision": ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    "an old adapter of a new LLaVA": (
        "language_model.model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",
    ),
    "an old adapter of a new Qwen2-VL": ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    "GPT-NeoX": ("lm_head", "embed_out"),
    "Mixtral": ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
}


@pytest.mark.parametrize(("module", "stored"), SPELLINGS.values(), ids=SPELLINGS)
def test_names_may_be_spelled_otherwise_in_files(tmp_path: Path, module: str, stored: str) -> None:
    found = fit(tmp_path, pair(module), {f"{stored}.weight": (32, 32), "other.weight": (3, 3)})
    assert set(found.changes) == {f"{stored}.weight"}


def test_an_output_embedding_without_weights_of_its_own_is_the_input_embedding(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    found = fit(tmp_path, pair("lm_head", outputs=96) | embedding("model.embed_tokens"), shapes, tied=True)
    first, second = found.changes["model.embed_tokens.weight"]
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    assert (first.inputs_first, second.inputs_first) == (True, False)


@pytest.mark.parametrize(
    ("saved", "config", "untied"),
    [
        ("lm_head", {"modules_to_save": ["lm_head"]}, ("lm_head.weight", "model.embed_tokens.weight")),
        (
            "model.embed_tokens",
            {"modules_to_save": ["embed_tokens"]},
            ("lm_head.weight", "model.embed_tokens.weight"),
        ),
        ("lm_head", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, None),
        ("model.embed_tokens", {}, None),  # saved because the vocabulary had been resized
    ],
)
def test_a_saved_module_ends_a_tie_unless_it_was_kept(
    tmp_path: Path, saved: str, config: dict[str, Any], untied: tuple[str, str] | None
) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    found = fit(tmp_path, {f"{saved}.weight": torch.ones(96, 32)}, shapes, tied=True, **config)
    assert found.untied == untied
    target = f"{saved}.weight" if untied else "model.embed_tokens.weight"
    assert [type(change) for change in found.changes[target]] == [SavedTensor]


def test_parameters_of_one_module_are_told_apart_by_their_shapes(tmp_path: Path) -> None:
    shapes = {"mlp.experts.gate_up_proj": (4, 64, 32), "mlp.experts.down_proj": (4, 32, 48)}
    tensors = pair("mlp.experts.base_layer", 8, 32, 64) | pair("mlp.experts", 8, 48, 32)
    found = fit(tmp_path, tensors, shapes, target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    first, second = (low_rank(found, name) for name in shapes)
    assert (first.stack, first.rank, first.rows, first.columns) == (4, 2, 64, 32)
    assert (second.stack, second.rank, second.rows, second.columns) == (4, 2, 32, 48)
    assert first.rounds_delta


def test_parameters_of_equal_shapes_are_told_apart_by_their_order(tmp_path: Path) -> None:
    shapes = {"mlp.experts.down_proj": (4, 32, 32), "mlp.experts.gate_up_proj": (4, 32, 32)}
    tensors = pair("mlp.experts.base_layer", 8) | pair("mlp.experts", 8)
    found = fit(tmp_path, tensors, shapes, target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    innermost = low_rank(found, "mlp.experts.gate_up_proj")
    assert innermost.a.name == "base_model.model.mlp.experts.base_layer.lora_A.weight"


# What does not


def refusal(directory: Path, *arguments: Any, kind: type[CheckpointError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        fit(directory, *arguments, **options)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


OTHER = "model.layers.1.self_attn.q_proj"


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, pair("transformer.h.0.attn.c_attn"))
    assert "fits no tensor of /models/base" in message
    assert "it changes module 'transformer.h.0.attn.c_attn'" in message


def test_an_adapter_that_fits_only_in_part_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, pair(Q) | pair(OTHER) | {"score.weight": torch.ones(2, 32)})
    assert f"fits /models/base only in part: the model has no weights for module '{OTHER}' and 1 more" in message


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (pair(Q, inputs=48), {}, f"the factors of module '{Q}' are [2, 48] and [32, 2], which do not fit"),
        (pair(DOWN, inputs=64, outputs=16), {}, f"do not fit tensor '{DOWN}.weight' of /models/base, [32, 64]"),
        (pair(Q, rank=4), {}, f"the factors of module '{Q}' have rank 4, and adapter_config.json says 2"),
        (pair(f"{LAYER}.input_layernorm"), {}, "which do not fit tensor 'model.layers.0.input_layernorm.weight'"),
        (embedding("model.embed_tokens", tokens=100), {}, "trained with 100 tokens, and the model has 96); resize"),
        (embedding("model.embed_tokens", width=16), {}, "do not fit tensor 'model.embed_tokens.weight'"),
        ({"lm_head.weight": torch.ones(100, 32)}, {}, "is [100, 32], and 'lm_head.weight' of /models/base is [96, 32]"),
        (pair(DOWN, inputs=64) | {f"{DOWN}.lora_B.bias": torch.ones(32)}, {}, f"'{DOWN}.bias', which /models/base"),
        (pair(Q), {"use_dora": True}, f"module '{Q}' has no magnitude vector, which contradicts use_dora"),
        (pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, "has a magnitude vector, which contradicts"),
        (pair(Q) | pair(f"{Q}.base_layer"), {}, f"several factors for module '{Q}', but target_parameters"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
            {},
            "the missing trainable_token_indices of module 'model.embed_tokens'",
        ),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
            {"trainable_token_indices": [1]},
            "does not fit the 1 trainable_token_indices",
        ),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
            {"trainable_token_indices": [1, 96]},
            "replaces token 96 of module 'model.embed_tokens', and the model has 96; resize",
        ),
    ],
)
def test_what_does_not_fit_names_the_module(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(tmp_path, tensors, **config)


def test_dora_by_columns_is_refused(tmp_path: Path) -> None:
    magnitude = {"h.0.attn.c_attn.lora_magnitude_vector": torch.ones(96)}
    shapes = {"h.0.attn.c_attn.weight": (32, 96)}
    message = refusal(
        tmp_path,
        pair("h.0.attn.c_attn", outputs=96) | magnitude,
        shapes,
        use_dora=True,
        kind=UnsupportedCheckpointError,
    )
    assert "module 'h.0.attn.c_attn' is a Conv1D adapted by DoRA" in message


def test_stacked_experts_of_a_model_that_holds_them_apart_are_refused(tmp_path: Path) -> None:
    shapes = {f"mlp.experts.{n}.{p}_proj.weight": (48, 32) for n in range(4) for p in ("gate", "up")}
    message = refusal(
        tmp_path,
        pair("mlp.experts", 8, 32, 96),
        shapes,
        target_parameters=["experts.gate_up_proj"],
        kind=UnsupportedCheckpointError,
    )
    assert "changes the experts of module 'mlp.experts' as one tensor, but /models/base holds each of them apart" in (
        message
    )


def test_parameters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shapes = {"mlp.experts.gate_up_proj": (4, 64, 32)}
    for tensors in (pair("mlp.experts", 8, 16, 64), pair("mlp.experts", 8, 32, 64) | pair("mlp.experts.base_layer", 8)):
        message = refusal(tmp_path, tensors, shapes, target_parameters=["experts.gate_up_proj"])
        assert "the factors of module 'mlp.experts' do not fit its parameters 'mlp.experts.gate_up_proj'" in message
