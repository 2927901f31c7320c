"""A model with an adapter applied to it equals what mergekit makes of the two by PEFT's merge_and_unload.

PEFT multiplies the factors by BLAS, which sums over the rank in its order, by fused multiply-adds, for all shapes that
models have; so do we, and the results are equal bit by bit. Where they may differ it is said here by how much, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import (
    ARCHITECTURES,
    BaseMaker,
    Pair,
    applied,
    architecture,
    gpt2,
    layers,
    llama,
    merged_by_mergekit,
    merged_module,
    mixture,
    read_all,
    stack_of_experts,
    train,
    train_module,
    write_adapter,
)
from safetensors.torch import save_file
from tensors import Tensors, bits, differing, load_model, unit_in_the_last_place

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EVERY_DTYPE = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "f16", "f32"])


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of model and a configuration of PEFT."""

    base: BaseMaker
    config: Mapping[str, Any]

    def train(self, directory: Path, dtype: torch.dtype, **options: Any) -> Pair:
        base = self.base(directory / "base", dtype)
        return train(base, directory / "adapter", **options, **self.config)


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
ALL_LINEAR = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
PATTERNS = {
    "rank_pattern": {"self_attn.q_proj": 5, "v_pro.": 3},
    "alpha_pattern": {"q_proj": 11, "layers.0.self_attn.v_proj": 0.5},
}

CASES = {
    "rank 1": Case(llama(), {"r": 1, "lora_alpha": 3, **ALL_LINEAR}),
    "all projections": Case(llama(), {"r": 8, "lora_alpha": 16, **ALL_LINEAR}),
    "a scaling that no float holds exactly": Case(llama(), {"r": 7, "lora_alpha": 11, **ALL_LINEAR}),
    "rslora": Case(llama(), {"r": 6, "lora_alpha": 5, "use_rslora": True, **ATTENTION}),
    "patterns": Case(llama(), {"r": 4, "lora_alpha": 8, **PATTERNS, **ATTENTION}),
    "patterns with rslora": Case(llama(), {"r": 4, "use_rslora": True, **PATTERNS, **ATTENTION}),
    "rank 64": Case(llama(hidden=128), {"r": 64, "lora_alpha": 32, **ATTENTION}),
    "MiCA": Case(llama(), {"r": 4, "init_lora_weights": "mica", **ATTENTION}),
    "saved modules": Case(llama(), {"r": 2, "modules_to_save": ["lm_head", "input_layernorm"], **ATTENTION}),
    "embeddings": Case(llama(), {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tokens": Case(llama(), {"r": 2, "trainable_token_indices": [5, 0, 95], **ATTENTION}),
    "tokens by module": Case(llama(), {"r": 2, "trainable_token_indices": {"embed_tokens": [7]}, **ATTENTION}),
    "a parameter": Case(llama(), {"r": 3, "target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}),
    "a tied input embedding": Case(llama(tied=True), {"r": 4, "target_modules": ["embed_tokens"]}),
    "a tied output embedding": Case(llama(tied=True), {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "both tied embeddings": Case(llama(tied=True), {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tokens of tied embeddings": Case(llama(tied=True), {"r": 2, "trainable_token_indices": [3, 1], **ATTENTION}),
    "GPT-2": Case(gpt2(), {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "GPT-2 embeddings": Case(gpt2(), {"r": 4, "target_modules": ["wte", "wpe"]}),
    "all biases": Case(gpt2(), {"r": 2, "target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "biases of adapted modules": Case(gpt2(), {"r": 2, "target_modules": ["c_attn"], "bias": "lora_only"}),
    "a bias of the factors": Case(gpt2(), {"r": 2, "lora_alpha": 7, "target_modules": ["c_attn"], "lora_bias": True}),
}


@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapted_model_equals_mergekit(tmp_path: Path, case: Case, dtype: torch.dtype) -> None:
    pair = case.train(tmp_path, dtype)
    theirs, _ = merged_by_mergekit(pair)
    assert differing(read_all(applied(pair)), theirs) == {}


@EVERY_DTYPE
def test_factors_in_the_dtype_of_the_model_are_multiplied_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    pair = CASES["all projections"].train(tmp_path, dtype, keep_dtype=True)
    theirs, _ = merged_by_mergekit(pair)
    assert differing(read_all(applied(pair)), theirs) == {}


def test_the_dtype_is_that_of_the_files_whatever_the_config_says(tmp_path: Path) -> None:
    pair = CASES["all projections"].train(tmp_path, F32)
    config = pair.base / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    theirs, _ = merged_by_mergekit(pair)
    assert differing(read_all(applied(pair)), theirs) == {}


def test_tensors_of_different_dtypes_keep_theirs(tmp_path: Path) -> None:
    """mergekit has transformers load all of them in the dtype of the first."""
    base = llama()(tmp_path / "base", BF16)
    tensors = load_model(base)
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "v_proj" in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    pair = train(base, tmp_path / "adapter", r=3, target_modules=["q_proj", "v_proj"])
    ours, (theirs, _) = read_all(applied(pair)), merged_by_mergekit(pair)
    mixed = "model.layers.0.self_attn.v_proj.weight"
    assert (ours[mixed].dtype, theirs[mixed].dtype) == (F32, BF16)
    assert differing({name: tensor.to(BF16) for name, tensor in ours.items()}, theirs) == {}


UNTIED = {
    "the input embedding": ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": False}),
    "the output embedding": ({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": False}),
    "both embeddings": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"tie_word_embeddings": False}),
    "both, kept tied": (
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize(("saved", "config"), UNTIED.values(), ids=UNTIED)
def test_a_saved_embedding_is_no_longer_tied(tmp_path: Path, saved: dict[str, Any], config: dict[str, bool]) -> None:
    pair = Case(llama(tied=True), {"r": 2, **saved, **ATTENTION}).train(tmp_path, BF16)
    theirs, their_config = merged_by_mergekit(pair)
    ours = applied(pair)
    assert differing(read_all(ours), theirs) == {}
    assert their_config["tie_word_embeddings"] == config["tie_word_embeddings"]
    assert ("lm_head.weight" in ours) != config["tie_word_embeddings"]


def test_files_without_the_name_of_the_inner_model_are_found(tmp_path: Path) -> None:
    pair = Case(gpt2(prefix=False), {"r": 2, "target_modules": ["c_attn", "wte"]}).train(tmp_path, BF16)
    theirs, _ = merged_by_mergekit(pair)
    ours = read_all(applied(pair))
    assert differing({f"transformer.{name}": tensor for name, tensor in ours.items()}, theirs) == {}


@EVERY_DTYPE
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_single_experts_equal_mergekit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = mixture(kind)(tmp_path / "base", dtype)
    leaves = ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    generator = torch.Generator().manual_seed(1)
    factors: Tensors = {}
    for name, tensor in load_model(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", *leaves)):
            factors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(2, tensor.shape[1], generator=generator)
            factors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(tensor.shape[0], 2, generator=generator)
    config = {"target_modules": [*leaves, "q_proj"], "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    pair = Pair(base, write_adapter(tmp_path / "adapter", factors, **config))
    theirs, _ = merged_by_mergekit(pair)
    assert differing(read_all(applied(pair)), theirs) == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_of_many_architectures_equal_mergekit(tmp_path: Path, name: str) -> None:
    pair = Case(architecture(name), {"r": 2, **ARCHITECTURES[name][2]}).train(tmp_path, BF16)
    theirs, _ = merged_by_mergekit(pair)
    ours = applied(pair)
    assert differing(read_all(ours), theirs) == {}
    assert any(place.parts for place in ours.values())


# Layers that no model of the tests has, by PEFT alone


@EVERY_DTYPE
@pytest.mark.parametrize("config", [{}, {"lora_bias": True, "use_rslora": True}], ids=["plain", "with biases"])
def test_convolutions_equal_peft(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    targets = ["line", "plane", "point", "room", "flat", *([] if config else ["words"])]
    pair = train_module(layers, tmp_path, dtype, r=4, lora_alpha=7, target_modules=targets, **config)
    assert differing(read_all(applied(pair)), merged_module(layers, pair, dtype)) == {}


STACKS = {
    "outputs first": ("none", False, (96, 32), (32, 48)),
    "inputs first": ("none", True, (32, 96), (48, 32)),
    "square, outputs first": ("none", False, (32, 32), (32, 32)),
    "square, inputs first": ("gpt_oss", True, (32, 32), (32, 32)),
}


@EVERY_DTYPE
@pytest.mark.parametrize(("model_type", "is_transposed", "first", "second"), STACKS.values(), ids=STACKS)
def test_stacked_experts_equal_peft(
    tmp_path: Path,
    model_type: str,
    is_transposed: bool,
    first: tuple[int, int],
    second: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    make = stack_of_experts(is_transposed, first, second)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"target_modules": [], "target_parameters": parameters, "model_type": model_type}
    pair = train_module(make, tmp_path, dtype, r=3, lora_alpha=7, **config)
    assert differing(read_all(applied(pair)), merged_module(make, pair, dtype)) == {}


# What is not the same in every bit


DORA = Case(llama(), {"r": 4, "lora_alpha": 7, "use_dora": True, **ALL_LINEAR})

_NORM = torch.linalg.norm


def _exact_norm(values: torch.Tensor, dim: int) -> torch.Tensor:
    return _NORM(values.double(), dim=dim).to(values.dtype)


@EVERY_DTYPE
def test_dora_equals_mergekit_where_that_takes_lengths_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pair = DORA.train(tmp_path, dtype)
    monkeypatch.setattr(torch.linalg, "norm", _exact_norm)
    theirs, _ = merged_by_mergekit(pair)
    assert differing(read_all(applied(pair)), theirs) == {}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_dora_differs_from_mergekit_by_one_unit_at_most_in_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch sums the squares of a row in float32, in an order of the CPU's."""
    pair = DORA.train(tmp_path, dtype)
    theirs, _ = merged_by_mergekit(pair)
    ours = read_all(applied(pair))
    assert ours.keys() == theirs.keys()
    assert max(int((bits(ours[n]).long() - bits(theirs[n]).long()).abs().max()) for n in ours) <= 1


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_a_rank_that_blas_sums_in_parts_differs_by_one_unit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of the larger of weight and result, and in few elements: sums in float32 that fall on two sides of a boundary."""
    pair = Case(llama(hidden=512), {"r": 512, "target_modules": ["q_proj"]}).train(tmp_path, dtype)
    theirs, _ = merged_by_mergekit(pair)
    ours = read_all(applied(pair))
    name = "model.layers.0.self_attn.q_proj.weight"
    mine, other, weight = ours.pop(name), theirs.pop(name), load_model(pair.base)[name]
    assert differing(ours, theirs) == {}
    distance = (mine.double() - other.double()).abs()
    assert bool((distance <= unit_in_the_last_place(torch.maximum(mine.abs(), weight.abs()))).all())
    assert int((distance > 0).sum()) < distance.numel() // 100
