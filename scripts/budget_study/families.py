"""The families that budgets are measured on: trained from scratch on the demo's text, and kept for the next run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mergefs.demo.corpus import Domain, load_domains
from mergefs.demo.tokenizer import BOS_ID, EOS_ID, VOCABULARY_SIZE
from mergefs.demo.training import Family, FamilyOptions, build_model, train_family
from mergefs.evaluation.imports import import_transformers


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """A family to be trained: its name in file names, its title for people, its shape and its architecture."""

    name: str
    title: str
    options: FamilyOptions
    build: Callable[[FamilyOptions], Any]


@dataclass(frozen=True, slots=True)
class TrainedFamily:
    """A family in its directories, and the text that no model of it has seen."""

    kind: FamilyKind
    models: Family
    domains: tuple[Domain, ...]


def build_neox(options: FamilyOptions) -> Any:
    """Return a GPTNeoXForCausalLM: biases, layer norms with two vectors, fused attention, a parallel residual."""
    transformers = import_transformers()
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate_size,
        max_position_embeddings=2 * options.context,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attn_implementation="eager",
    )
    return transformers.GPTNeoXForCausalLM(config).float()


LLAMA: Final = FamilyKind("llama", "Llama, the family of `mergefs demo`", FamilyOptions(), build_model)
NEOX: Final = FamilyKind(
    "neox",
    "GPT-NeoX",
    FamilyOptions(
        hidden_size=160,
        layers=4,
        intermediate_size=640,
        batch=8,
        base_steps=260,
        expert_steps=90,
        base_learning_rate=3e-3,
        expert_learning_rate=1.5e-3,
        seed=21,
        precision="float32",
    ),
    build_neox,
)
KINDS: Final = (LLAMA, NEOX)

_TINY_STEPS: Final = 6


def smaller(kind: FamilyKind) -> FamilyKind:
    """Return a kind of the same architecture that is trained in a second: to see that everything runs."""
    options = replace(
        kind.options,
        hidden_size=32,
        layers=1,
        heads=2,
        key_value_heads=1,
        intermediate_size=48,
        context=32,
        batch=4,
        base_steps=_TINY_STEPS,
        expert_steps=_TINY_STEPS,
        precision="float32",
    )
    return replace(kind, options=options)


def train(kind: FamilyKind, directory: Path, say: Callable[[str], None]) -> TrainedFamily:
    """Train ``kind`` below ``directory``, or take what was trained there before."""
    domains = load_domains()

    def report(title: str, step: int, steps: int, loss: float) -> None:
        if step == steps or step % 50 == 0:
            say(f"{kind.name}: {title}: step {step} of {steps}, loss {loss:.3f}")

    return TrainedFamily(kind, train_family(directory, kind.options, domains, report, kind.build), domains)
