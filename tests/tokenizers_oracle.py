"""mergekit's merged tokenizers, with what it leaves to chance or to the machine fixed.

It goes over the models of a merge in the order of a set, over tokens in the order of a hash table, and takes the mean
that padding gets in float32 in an order that depends on the CPU.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.tokenizer import embed
from mergekit.tokenizer.build import TokenizerInfo, build_tokenizer
from oracle import _replaced, _TorchBut
from transformers import TokenizersBackend

_GET_VOCAB = TokenizersBackend.get_vocab


def _vocabulary_in_order(tokenizer: TokenizersBackend) -> dict[str, int]:
    return dict(sorted(_GET_VOCAB(tokenizer).items(), key=lambda item: (item[1], item[0])))


def _models_in_order(configuration: MergeConfiguration) -> list[ModelReference]:
    """Return the models as they are listed, then the base where it is not among them."""
    entries: list[Any] = list(configuration.models or [])
    slices = list(configuration.slices or [])
    for module in (configuration.modules or {}).values():  # into which mergekit turns the others as it plans
        entries += module.models or []
        slices += module.slices or []
    entries += [source for part in slices for source in part.sources]
    found = [entry.model for entry in entries]
    return list(dict.fromkeys([*found, *([configuration.base_model] if configuration.base_model else [])]))


@contextlib.contextmanager
def orders_fixed() -> Iterator[None]:
    """Let mergekit go over models as the recipe lists them, and over tokens in the order of their ids."""
    with (
        _replaced(TokenizersBackend, "get_vocab", _vocabulary_in_order),
        _replaced(MergeConfiguration, "referenced_models", _models_in_order),
    ):
        yield


def _mean_row(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the mean over the first dimension, summed row by row in float64 and rounded once."""
    assert dim == 0
    total = torch.from_numpy(np.asarray(values.double().numpy().sum(axis=0)))
    return (total / values.shape[0]).to(values.dtype)


@contextlib.contextmanager
def exact_padding() -> Iterator[None]:
    """Let mergekit take the mean that padding rows get in float64, and round it once."""
    with _replaced(embed, "torch", _TorchBut(mean=_mean_row)):
        yield


def mergekit_vocabulary(document: Mapping[str, Any]) -> TokenizerInfo:
    """Return what mergekit makes of the tokenizers of a recipe."""
    with orders_fixed():
        configuration = MergeConfiguration.model_validate(dict(document))
        source: Any = configuration.tokenizer_source
        tokens: tuple[str, ...] = ()
        if configuration.tokenizer is not None:
            source, tokens = configuration.tokenizer.source, tuple(configuration.tokenizer.tokens or {})
        return build_tokenizer(
            base_model=configuration.base_model,
            referenced_models=configuration.referenced_models(),
            tokenizer_source=source,
            trust_remote_code=False,
            add_tokens=list(tokens),
        )
