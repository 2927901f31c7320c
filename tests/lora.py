"""LoRA adapters: trained (that is, filled with random numbers), saved and merged by the reference libraries."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import llama_config, llama_tensors, write_model
from mergekit.common import ModelReference, get_auto_cls
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tensors import Tensors, load_model
from torch import nn

from mergefs.checkpoint.adapter import open_adapter
from mergefs.checkpoint.adapter_fit import fit_adapter
from mergefs.checkpoint.adapter_names import Outline
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.sources.adapted import adapted_tensors
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader

BaseMaker = Callable[[Path, torch.dtype], Path]
"""Writes a model of a dtype into a directory and returns it."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and an adapter for it."""

    base: Path
    adapter: Path

    @property
    def text(self) -> str:
        """The pair as a recipe names it."""
        return f"{self.base}+{self.adapter}"


# Models


def llama(tied: bool = False, **shape: int) -> BaseMaker:
    """Return a maker of Llama models of one layer."""

    def make(directory: Path, dtype: torch.dtype) -> Path:
        options: dict[str, Any] = {"layers": 1, "tied": tied, **shape}
        return write_model(directory, llama_tensors(0, dtype, **options), llama_config(dtype, **options))

    return make


def gpt2(prefix: bool = True, **shape: int) -> BaseMaker:
    """Return a maker of GPT-2 models, whose weights lie the other way round; ``prefix`` as in the files on the Hub."""

    def make(directory: Path, dtype: torch.dtype) -> Path:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32, **shape)
        transformers.GPT2LMHeadModel(config).to(dtype).save_pretrained(directory)
        if not prefix:
            tensors = load_model(directory)
            save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, _weights(directory))
        return directory

    return make


_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

ARCHITECTURES: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "GPT-OSS": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(**_GROUPED | {"intermediate_size": 32, "num_local_experts": 3}),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "Llama 4": (
        "Llama4ForCausalLM",
        lambda: transformers.Llama4TextConfig(
            **_GROUPED, intermediate_size_mlp=48, num_local_experts=3, interleave_moe_layer_step=1
        ),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "Phi 3": (
        "Phi3ForCausalLM",
        lambda: transformers.Phi3Config(**_SMALL, num_key_value_heads=2, intermediate_size=48, pad_token_id=0),
        {"target_modules": "all-linear"},
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        lambda: transformers.Gemma3Config(
            text_config=_GROUPED,
            vision_config={**_VISION, "image_size": 28, "patch_size": 14},
            image_token_index=59,
            boi_token_index=57,
            eoi_token_index=58,
        ),
        {"target_modules": ["q_proj", "fc1"]},
    ),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_SMALL, intermediate_size=48),
        {"target_modules": ["query_key_value", "embed_in", "lm_head"]},
    ),
    "OPT": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**_SMALL, ffn_dim=48, word_embed_proj_dim=32),
        {"target_modules": ["q_proj", "fc1"], "bias": "all"},
    ),
    "Bloom": (
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=60),
        {"target_modules": ["query_key_value", "word_embeddings"]},
    ),
    "Mamba": (
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=60, state_size=4),
        {"target_modules": ["in_proj", "x_proj", "embeddings"]},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, vocab_size=60),
        {"target_modules": ["q", "wi"]},
    ),
}
"""Architectures of other shapes and names than Llama's: the class, a small configuration, and what to adapt of it."""


def architecture(name: str) -> BaseMaker:
    """Return a maker of models of one of ``ARCHITECTURES``."""
    model_class, config, _ = ARCHITECTURES[name]

    def make(directory: Path, dtype: torch.dtype) -> Path:
        torch.manual_seed(0)
        getattr(transformers, model_class)(config()).to(dtype).save_pretrained(directory)
        return directory

    return make


def mixture(kind: str) -> BaseMaker:
    """Return a maker of models with experts, of which the files hold each apart."""

    def make(directory: Path, dtype: torch.dtype) -> Path:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 32, "head_dim": 8}
        model: Any
        if kind == "mixtral":
            config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=3, **sizes)
            model = transformers.MixtralForCausalLM(config)
        else:
            moe = transformers.Qwen3MoeConfig(moe_intermediate_size=20, num_experts=3, **sizes)
            model = transformers.Qwen3MoeForCausalLM(moe)
        model.to(dtype).save_pretrained(directory)
        return directory

    return make


class Experts(nn.Module):
    """Parameters of stacked experts: (experts, outputs, inputs), or (experts, inputs, outputs) when transposed."""

    def __init__(self, is_transposed: bool, first: tuple[int, int], second: tuple[int, int]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, *first))
        self.down_proj = nn.Parameter(torch.randn(4, *second))
        self.is_transposed = is_transposed


def stack_of_experts(is_transposed: bool, first: tuple[int, int], second: tuple[int, int]) -> Callable[[], nn.Module]:
    """Return a maker of a module with nothing but stacked experts in it."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"experts": Experts(is_transposed, first, second)})

    return make


def layers() -> nn.Module:
    """Return a module with layers of every kind that PEFT can merge."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "line": nn.Conv1d(6, 10, 3),
            "plane": nn.Conv2d(4, 6, (3, 5)),
            "point": nn.Conv2d(64, 32, 1),
            "room": nn.Conv3d(2, 4, (2, 3, 2)),
            "flat": nn.Linear(64, 48),
            "words": nn.Embedding(40, 32),
        }
    )


# Adapters


def train(base: Path, adapter: Path, seed: int = 1, keep_dtype: bool = False, **config: Any) -> Pair:
    """Save an adapter for the model in ``base``; ``config`` is that of PEFT.

    With ``keep_dtype`` the factors have the dtype of the model, and not float32.
    """
    architectures = json.loads((base / "config.json").read_text())["architectures"]
    model = get_auto_cls(architectures[0]).from_pretrained(base)
    _save(model, adapter, seed, keep_dtype, config)
    return Pair(base, adapter)


def train_module(make: Callable[[], nn.Module], directory: Path, dtype: torch.dtype, **config: Any) -> Pair:
    """Save a module that is no model of transformers, as a model directory, and an adapter for it.

    ``model_type`` is the one of its config.json; the rest of ``config`` is that of PEFT.
    """
    base = directory / "base"
    base.mkdir(parents=True)
    document = {"model_type": config.pop("model_type", "none"), "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(document))
    module = make().to(dtype)
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, _weights(base))
    _save(module, directory / "adapter", 1, False, config)
    return Pair(base, directory / "adapter")


def write_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter by hand: tensors by their names without the prefix, and what differs in its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, directory / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def _save(model: Any, adapter: Path, seed: int, keep_dtype: bool, config: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=not keep_dtype)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data + noise.to(parameter.dtype)
        wrapped.save_pretrained(adapter)


def _weights(directory: Path) -> Path:
    return directory / "model.safetensors"


# Merged by the reference


def merged_by_mergekit(pair: Pair) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the config.json of the model that mergekit makes of a model and an adapter."""
    reference = ModelReference.model_validate({"model": {"path": str(pair.base)}, "lora": {"path": str(pair.adapter)}})
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = Path(reference.merged(cache_dir=cache).model.path)
        return load_model(merged), json.loads((merged / "config.json").read_text())


def merged_module(make: Callable[[], nn.Module], pair: Pair, dtype: torch.dtype) -> Tensors:
    """Return the tensors of a module with its adapter folded in by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make().to(dtype), str(pair.adapter))
        merged: Tensors = model.merge_and_unload().state_dict()
        return merged


# Applied by mergefs


def applied(pair: Pair) -> dict[str, Place]:
    """Return the tensors of a model with its adapter applied; the model's bytes are the base's, the adapter's not."""
    checkpoint, adapter = open_checkpoint(pair.base), open_adapter(pair.adapter)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    outline = Outline(str(checkpoint.path), shapes, checkpoint.config, checkpoint.ties_embeddings)
    places: dict[str, Place] = {name: StoredTensor.of(checkpoint, name, Role.BASE) for name in checkpoint.tensors}
    return adapted_tensors(places, fit_adapter(adapter, outline), adapter.shards[0], Role.EXPERT)


def read(place: Place, reader: SourceReader, purpose: Purpose = Purpose.EXPERT) -> torch.Tensor:
    """Return a whole tensor."""
    data = place.read(reader, 0, place.elements, purpose)
    return torch.from_numpy(np.copy(data)).view(_DTYPES[place.dtype.name]).reshape(place.shape)


def read_all(places: Mapping[str, Place]) -> Tensors:
    """Return all tensors."""
    reader = SourceReader(Ledger())
    try:
        return {name: read(place, reader) for name, place in places.items()}
    finally:
        reader.close()


def copy_of(pair: Pair, directory: Path) -> Pair:
    """Return a copy that a test may damage."""
    for name, source in (("base", pair.base), ("adapter", pair.adapter)):
        shutil.copytree(source, directory / name)
    return Pair(directory / "base", directory / "adapter")
