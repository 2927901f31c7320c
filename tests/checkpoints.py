"""Tiny Llama model directories, written by the reference library, for tests to open, merge and load."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN = 32
LAYERS = 2
VOCABULARY = 96
HEADS = 4
KEY_VALUE_HEADS = 2


@dataclass(frozen=True, slots=True)
class Family:
    """A base model and the experts made from it."""

    base: Path
    experts: tuple[Path, ...]


def llama_config(
    dtype: torch.dtype,
    *,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    vocabulary: int = VOCABULARY,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the ``config.json`` of the Llama model whose tensors ``llama_tensors`` makes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": hidden // HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def llama_tensors(
    seed: int,
    dtype: torch.dtype,
    *,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    vocabulary: int = VOCABULARY,
    tied: bool = False,
) -> dict[str, torch.Tensor]:
    """Return random tensors of a whole Llama model, the same for the same arguments.

    ``hidden`` must be a multiple of 8, for heads of an even size.
    """
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype)

    key_value = hidden // HEADS * KEY_VALUE_HEADS
    tensors = {"model.embed_tokens.weight": matrix(vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": norm(),
            f"{prefix}.mlp.gate_proj.weight": matrix(2 * hidden, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(2 * hidden, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, 2 * hidden),
        }
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = matrix(vocabulary, hidden)
    return tensors


def write_model(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    shards: int = 1,
    tokenizer_files: bool = True,
) -> Path:
    """Write a Hugging Face model directory and return it.

    With ``shards`` above 1 the tensors are spread over that many files, in their order, with an index. The
    tokenizer is a whole one: a word for every id below ``config["vocab_size"]``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if tokenizer_files:
        _write_tokenizer(directory, int(config.get("vocab_size", VOCABULARY)))
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return directory
    names = list(tensors)
    if not 1 < shards <= len(names):
        raise ValueError(f"{len(names)} tensors cannot be spread over {shards} shards")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        members = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        save_file({name: tensors[name] for name in members}, directory / file_name, metadata=metadata)
        weight_map |= dict.fromkeys(members, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )
    return directory


def family(
    tmp_path: Path,
    *,
    experts: int,
    dtype: torch.dtype,
    tied: bool,
    shards: int,
    seed: int = 0,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    vocabulary: int = VOCABULARY,
) -> Family:
    """Write a base model and ``experts`` fine-tuned versions of it below ``tmp_path``.

    An expert is the base plus small random deltas, rounded to ``dtype``. A fifth of the elements equal the base;
    the final norm is frozen in all experts, and one projection, another in each expert, is frozen in that one.
    """
    config = llama_config(dtype, hidden=hidden, layers=layers, vocabulary=vocabulary, tied=tied)
    base = llama_tensors(seed, dtype, hidden=hidden, layers=layers, vocabulary=vocabulary, tied=tied)
    base_path = write_model(tmp_path / "base", base, config, shards)
    paths = []
    for number in range(experts):
        tensors = fine_tuned(base, dtype, seed=seed + 1000 * (number + 1), frozen=_frozen_names(base, number))
        paths.append(write_model(tmp_path / f"expert-{number + 1}", tensors, config, shards))
    return Family(base_path, tuple(paths))


def _frozen_names(base: dict[str, torch.Tensor], number: int) -> set[str]:
    projections = [name for name in base if name.endswith("_proj.weight")]
    return {"model.norm.weight", projections[number % len(projections)]}


def fine_tuned(
    base: dict[str, torch.Tensor], dtype: torch.dtype, *, seed: int, frozen: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the base plus small random deltas: none in a fifth of the elements, and none in ``frozen`` tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in base.items():
        delta = 0.01 * torch.randn(tensor.shape, generator=generator)
        touched = torch.rand(tensor.shape, generator=generator) >= 0.2
        changed = torch.where(touched, tensor.float() + delta, tensor.float()).to(dtype)
        tensors[name] = tensor.clone() if name in frozen else changed
    return tensors


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(len(special), vocabulary)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    _write_json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: number for number, word in enumerate(words)},
                "unk_token": "<unk>",
            },
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 64,
        },
    )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
