"""Adapter directories: what is read of them, and what is refused, in a sentence that names file, key and remedy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import llama, train, write_adapter
from safetensors.torch import save_file

from mergefs.checkpoint.adapter import open_adapter
from mergefs.checkpoint.adapter_config import read_adapter_config
from mergefs.checkpoint.weights import is_adapter
from mergefs.errors import CheckpointError, UnsupportedCheckpointError
from mergefs.sources.reader import check_unchanged

MODULE = "model.layers.0.self_attn.q_proj"


def factors(module: str = MODULE, rank: int = 2, inputs: int = 32, outputs: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, inputs),
        f"{module}.lora_B.weight": torch.ones(outputs, rank),
    }


def refusal(adapter: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_adapter(adapter)
    assert str(adapter) in str(caught.value)
    return str(caught.value)


# What is read


def test_an_adapter_that_peft_has_saved_is_opened_by_its_headers(tmp_path: Path) -> None:
    base = llama()(tmp_path / "base", torch.bfloat16)
    pair = train(base, tmp_path / "adapter", r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapter = open_adapter(pair.adapter)
    assert [found.module for found in adapter.factors] == ["model.layers.0.mlp.down_proj", MODULE]
    assert [(found.a.shape, found.b.shape) for found in adapter.factors] == [((3, 64), (32, 3)), ((3, 32), (32, 3))]
    assert adapter.config.base_model == str(base)
    assert adapter.config.scaling_of(MODULE) == 2
    assert adapter.total_bytes == 4 * 3 * (64 + 32 + 32 + 32)
    assert (adapter.saved, adapter.tokens) == ({}, {})


def test_the_name_of_the_adapter_may_stand_in_the_names_of_tensors(tmp_path: Path) -> None:
    named = {
        f"{MODULE}.lora_A.default.weight": torch.ones(2, 32),
        f"{MODULE}.lora_B.default.weight": torch.ones(32, 2),
        "lm_head.modules_to_save.default.weight": torch.ones(96, 32),
        "model.embed_tokens.lora_embedding_A.default": torch.ones(2, 96),
        "model.embed_tokens.lora_embedding_B.default": torch.ones(32, 2),
        "model.embed_tokens.base_layer.weight": torch.ones(96, 32),
    }
    adapter = open_adapter(write_adapter(tmp_path, named))
    assert [found.module for found in adapter.factors] == ["model.embed_tokens", MODULE]
    assert sorted(adapter.saved) == ["lm_head.weight", "model.embed_tokens.weight"]


PATTERNS = [
    ({"r": 8, "lora_alpha": 4}, MODULE, (8, 0.5)),
    ({"r": 4, "lora_alpha": 4, "use_rslora": True}, MODULE, (4, 2.0)),
    ({"rank_pattern": {"q_proj": 4}, "lora_alpha": 4}, MODULE, (4, 1.0)),
    ({"rank_pattern": {"proj": 4}, "lora_alpha": 4}, MODULE, (2, 2.0)),  # names are matched from a dot to the end
    ({"rank_pattern": {"self_attn.q_proj": 8, ".*": 1}, "lora_alpha": 4}, MODULE, (8, 0.5)),
    ({"rank_pattern": {"layers.[1-9].self_attn.q_proj": 8}, "lora_alpha": 4}, MODULE, (2, 2.0)),
    ({"alpha_pattern": {"k_proj": 1, "q_proj": 0.5}, "lora_alpha": 4}, MODULE, (2, 0.25)),
    ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 6}, "lora_alpha": 4}, MODULE, (2, 3.0)),
]


@pytest.mark.parametrize(("config", "module", "expected"), PATTERNS)
def test_rank_and_scaling_of_a_module(
    tmp_path: Path, config: dict[str, Any], module: str, expected: tuple[int, float]
) -> None:
    read = read_adapter_config(write_adapter(tmp_path, factors(), **config) / "adapter_config.json")
    assert (read.rank_of(module), read.scaling_of(module)) == expected


def test_keys_that_only_concern_training_are_passed_over(tmp_path: Path) -> None:
    neutral = {
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
        "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
        "layers_to_transform": [0],
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "gaussian",
        "some_future_number": 16,
        "some_future_switch": False,
        "some_future_config": None,
    }
    assert open_adapter(write_adapter(tmp_path, factors(), **neutral)).factors


def test_a_directory_with_the_weights_of_a_model_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    base = llama()(tmp_path / "base", torch.bfloat16)
    write_adapter(tmp_path / "adapter", factors())
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(base)
    write_adapter(base, factors())
    assert not is_adapter(base)


def test_a_change_of_any_file_is_noticed(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        adapter = open_adapter(write_adapter(tmp_path, factors()))
        os.utime(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            check_unchanged(adapter.checked_files)
        assert open_adapter(tmp_path).local_identity != adapter.local_identity


# What is refused


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.floats() | st.text(max_size=5) | st.sampled_from(["(", ".*"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora"),
        *("init_lora_weights", "modules_to_save", "target_parameters", "trainable_token_indices", "revision", "bias"),
        *("base_model_name_or_path", "ensure_weight_tying", "layer_replication", "some_future_key"),
    ]
)


@given(changes=st.dictionaries(KEYS, JSON_VALUES, max_size=4))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_configuration_holds_it_is_read_or_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_adapter(tmp_path, factors())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    try:
        config = open_adapter(tmp_path).config
    except CheckpointError as error:
        assert "adapter_config.json" in str(error)
        assert "\n" not in str(error)
    else:
        assert config.rank_of(MODULE) >= 1
        assert isinstance(config.scaling_of(MODULE), float)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": "IA3"}, "an adapter of type IA3, and only LoRA can be applied"),
        ({"peft_type": "LOHA"}, "an adapter of type LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type PREFIX_TUNING"),
        ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens', and activated LoRA"),
        ({"use_qalora": True}, "'use_qalora', and QALoRA belongs to quantised weights"),
        ({"kasa_config": {"alpha": 1}}, "'kasa_config'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "'layer_replication'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by PiSSA (init_lora_weights: 'pissa_niter_4')"),
        ({"init_lora_weights": "olora"}, "initialised by OLoRA"),
        ({"some_future_variant": True}, "'some_future_variant', which is not known here"),
        ({"some_future_config": {"x": 1}}, "'some_future_config', which is not known here"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    kind = CheckpointError if config == {"peft_type": None} else UnsupportedCheckpointError
    message = refusal(write_adapter(tmp_path, factors(), **config), kind)
    assert sentence in message
    assert kind is CheckpointError or "merge_and_unload()" in message


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 0}, "'r' must be a whole number of at least 1, not 0"),
        ({"r": "8"}, "'r' must be a whole number of at least 1, not '8'"),
        ({"r": True}, "'r' must be a whole number of at least 1, not True"),
        ({"lora_alpha": None}, "'lora_alpha' must be a finite number, not None"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' must be a finite number, not nan"),
        ({"use_rslora": 1}, "'use_rslora' must be true or false, not 1"),
        ({"base_model_name_or_path": 7}, "'base_model_name_or_path' must be text, not 7"),
        ({"rank_pattern": [1]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"q": 0}}, "'rank_pattern' must be a whole number of at least 1, not 0"),
        ({"alpha_pattern": {"(": 1}}, "'alpha_pattern' must be an object from regular expressions"),
        ({"modules_to_save": "lm_head"}, "'modules_to_save' must be a list of names, not 'lm_head'"),
        ({"target_parameters": [1]}, "'target_parameters' must be a list of names, not [1]"),
        ({"trainable_token_indices": [1, 1]}, "'trainable_token_indices' must be a list of different token numbers"),
        ({"trainable_token_indices": {"a": [-1]}}, "'trainable_token_indices' must be a list of different"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    message = refusal(write_adapter(tmp_path, factors(), **config))
    assert "adapter_config.json" in message
    assert sentence in message


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "holds no tensors"),
        ({f"{MODULE}.lora_A.weight": torch.ones(2, 32)}, f"module '{MODULE}' lacks lora_B"),
        ({f"{MODULE}.lora_B.weight": torch.ones(32, 2)}, f"module '{MODULE}' lacks lora_A"),
        (factors() | {f"{MODULE}.lora_A.other.weight": torch.ones(2, 32)}, "stand for the same thing"),
        (
            {f"{MODULE}.lora_A.one.weight": torch.ones(2, 32), f"{MODULE}.lora_B.two.weight": torch.ones(32, 2)},
            "holds the adapters 'one' and 'two'",
        ),
        (factors() | {f"{MODULE}.lora_embedding_A": torch.ones(2, 32)}, f"module '{MODULE}' lacks lora_embedding_B"),
        (factors() | {f"{MODULE}.lora_diag": torch.ones(2)}, "a variant of LoRA that is not known here"),
        (factors() | {f"{MODULE}.lora_B.bias": torch.ones(31)}, "is [31], but module"),
        (factors() | {f"{MODULE}.lora_B.weight": torch.ones(32, 3)}, f"the factors of module '{MODULE}' are [2, 32]"),
        (factors() | {f"{MODULE}.lora_A.weight": torch.ones(0)}, f"the factors of module '{MODULE}' are [0]"),
        (factors() | {f"{MODULE}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, "is I8, and only floating"),
    ],
)
def test_tensors_that_make_no_adapter_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], sentence: str
) -> None:
    assert sentence in refusal(write_adapter(tmp_path, tensors))


def test_names_without_the_prefix_of_peft_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    assert "does not begin with 'base_model.model.'" in refusal(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "unpickling runs code from the file" in refusal(tmp_path, UnsupportedCheckpointError)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors; download the adapter again" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_a_damaged_file_is_refused_as_those_of_models_are(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors())
    os.truncate(tmp_path / "adapter_model.safetensors", 200)
    assert "adapter_model.safetensors" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    assert "must hold an object" in refusal(tmp_path)
