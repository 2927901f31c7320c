"""What decides the tensors of a Llama model, and such shapes by name and by size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

BYTES_OF_A_PARAMETER: Final = 2
"""All models here are BF16."""

_MOST_TOKENS: Final = 32000


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the tensors of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in the order of a checkpoint."""
        key_value = self.hidden // self.heads * self.key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.k_proj.weight": (key_value, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (key_value, self.hidden),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def parameters(self) -> int:
        """How many parameters such a model has."""
        return sum(map(math.prod, self.tensors().values()))

    def config(self) -> dict[str, Any]:
        """Return the ``config.json`` of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def shards(self, largest: int) -> list[dict[str, tuple[int, ...]]]:
        """Return the tensors in files of at most ``largest`` bytes, or of one tensor that is larger."""
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, dimensions in self.tensors().items():
            size = BYTES_OF_A_PARAMETER * math.prod(dimensions)
            if shards[-1] and filled + size > largest:
                shards.append({})
                filled = 0
            shards[-1][name] = dimensions
            filled += size
        return shards


LLAMA_70B: Final = Shape(hidden=8192, intermediate=28672, layers=80, heads=64, key_value_heads=8, vocabulary=128256)
LLAMA_405B: Final = Shape(hidden=16384, intermediate=53248, layers=126, heads=128, key_value_heads=8, vocabulary=128256)


def shard_name(number: int, count: int) -> str:
    """Return the name of a file of weights; ``number`` counts from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def weight_map(shards: list[dict[str, tuple[int, ...]]]) -> Mapping[str, str]:
    """Return the file of each tensor."""
    return {name: shard_name(number, len(shards)) for number, tensors in enumerate(shards, start=1) for name in tensors}


def shape_of_size(size: int) -> Shape:
    """Return a Llama shape of at least ``size`` bytes in BF16, as wide as ordinary ones of five or more layers."""
    candidates = (_of_width(hidden, size) for hidden in (4096, 3072, 2048, 1024, 512, 256, 128))
    return next((shape for shape in candidates if shape.layers >= 5), _of_width(64, size))


def _of_width(hidden: int, size: int) -> Shape:
    """Return the smallest shape of a width that has ``size`` bytes, with one layer at least."""
    heads = max(2, hidden // 128)

    def shape(layers: int) -> Shape:
        return Shape(hidden, hidden * 11 // 4, layers, heads, max(1, heads // 4), min(8 * hidden, _MOST_TOKENS))

    without = shape(0).parameters
    layer = shape(1).parameters - without
    return shape(max(1, -(-(-(-size // BYTES_OF_A_PARAMETER) - without) // layer)))
