"""One tiny set of models on disk that every form of a recipe can be written for: experts, an adapter, vocabularies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from checkpoints import Family, llama_config, llama_tensors, write_model
from lora import write_adapter

HIDDEN: Final = 16
LAYERS: Final = 3
VOCABULARY: Final = 24


@dataclass(frozen=True, slots=True)
class World:
    """A base model, two experts, a LoRA adapter of the base, and an expert with a vocabulary of its own."""

    base: Path
    first: Path
    second: Path
    adapter: Path
    foreign: Path

    @property
    def family(self) -> Family:
        """The base and its experts."""
        return Family(self.base, (self.first, self.second))

    @property
    def adapted(self) -> str:
        """The adapter on its base, as a recipe names it."""
        return f"{self.base}+{self.adapter}"


def make_world(directory: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> World:
    """Write the models below ``directory``; the same for the same dtype, however many shards they have."""
    shape: dict[str, Any] = {"hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY}

    def model(name: str, seed: int, **others: Any) -> Path:
        tensors = llama_tensors(seed, dtype, **shape | others)
        return write_model(directory / name, tensors, llama_config(dtype, **shape | others), shards)

    foreign = model("foreign", 3, vocabulary=VOCABULARY + 5)
    _rename_words(foreign / "tokenizer.json")
    return World(
        base=model("base", 0),
        first=model("first", 1),
        second=model("second", 2),
        adapter=_write_adapter(directory / "adapter", directory / "base"),
        foreign=foreign,
    )


def _rename_words(path: Path) -> None:
    """Give a tokenizer words that the others lack in place of some that they have."""
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {(f"v{i}" if i % 3 == 2 and i > 2 else word): i for word, i in words.items()}
    path.write_text(json.dumps(tokenizer))


def _write_adapter(directory: Path, base: Path) -> Path:
    """Write a LoRA adapter of rank 2 for some projections of ``base``."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", 2 * HIDDEN)):
            prefix = f"model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return write_adapter(directory, tensors, base_model_name_or_path=str(base), target_modules=["q_proj", "up_proj"])
