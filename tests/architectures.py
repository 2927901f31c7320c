"""Tiny models of many architectures: names, shapes and configs are those that transformers writes, the values ours."""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class of transformers with a config of a few dozen kilobytes."""

    model: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def with_settings(self, **settings: Any) -> "Architecture":
        """Return the architecture with other settings of its config."""
        return Architecture(self.model, self.config, {**self.settings, **settings})


LLAMA = Architecture("LlamaForCausalLM", "LlamaConfig", _DECODER)
QWEN2_TIED = Architecture("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True})
MISTRAL = Architecture("MistralForCausalLM", "MistralConfig", {**_DECODER, "head_dim": 8})
GEMMA = Architecture("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 16})
GPT2 = Architecture(
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "n_embd": 16,
        "n_layer": 12,
        "n_head": 2,
        "n_positions": 32,
        "vocab_size": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
QWEN2_VL = Architecture(
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLConfig",
    {
        "text_config": {
            **_DECODER,
            "rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        "vocab_size": 96,
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
)
FLORENCE2 = Architecture(
    "Florence2ForConditionalGeneration",
    "Florence2Config",
    {
        "text_config": {
            "model_type": "bart",
            "vocab_size": 96,
            "d_model": 16,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 16,
            "max_temporal_embeddings": 4,
            "max_position_embeddings": 8,
        },
        "image_token_id": 90,
        "is_encoder_decoder": True,
    },
)
WHISPER = Architecture(
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {
        "vocab_size": 96,
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "d_model": 16,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    },
)


def make_model(
    architecture: Architecture, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the ``config.json`` of a model and random tensors for it, the same for the same arguments."""
    config, shapes = _written_by_transformers(
        architecture.model, architecture.config, json.dumps(architecture.settings)
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    return _with_dtype(config, dtype), tensors


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return values of the sizes that trained models have: norms near one, biases near zero."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return 0.02 * values if name.endswith("bias") else 1 + 0.1 * values


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a config that names ``dtype`` wherever it names one."""
    name = str(dtype).removeprefix("torch.")
    return {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else name if key == "dtype" else value
        for key, value in config.items()
    }


@lru_cache
def _written_by_transformers(
    model: str, config: str, settings: str
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the config and the shapes of the tensors that transformers saves for a model."""
    import transformers

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        made = getattr(transformers, model)(getattr(transformers, config)(**json.loads(settings)))
        made.save_pretrained(directory)
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        document: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text())
    return document, dict(sorted(shapes.items()))
