"""What models say of text: perplexity, and how far two of them are apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mergefs.evaluation.text import Windows

Advance = Callable[[int], None]
"""Called with the number of windows that have been looked at."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How the next-token distributions of a model differ from those of another, on average over tokens.

    ``kl`` is KL(first || second) in nats; ``agreement`` the share of tokens whose most likely successor is the same.
    """

    kl: float
    agreement: float


def perplexity(model: Any, windows: Windows, batch: int, advance: Advance = lambda count: None) -> float:
    """Return exp of the mean negative log-likelihood of each predicted token."""
    total = 0.0
    for rows in torch.split(windows.tokens, batch):
        log_probabilities = _log_probabilities(model, rows)
        following = rows[:, 1:, None].to(log_probabilities.device)
        total -= float(log_probabilities.gather(-1, following).cpu().double().sum())
        advance(len(rows))
    return math.exp(total / windows.predicted)


def divergence(
    first: Any, second: Any, windows: Windows, batch: int, advance: Advance = lambda count: None
) -> Divergence:
    """Return how ``second`` differs from ``first``; both have the same vocabulary."""
    kl, agreeing = 0.0, 0
    for rows in torch.split(windows.tokens, batch):
        ours, theirs = _log_probabilities(first, rows), _log_probabilities(second, rows)
        kl += float((ours.exp() * (ours - theirs)).sum(dim=-1).cpu().double().sum())
        agreeing += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        advance(len(rows))
    return Divergence(max(kl / windows.predicted, 0.0), agreeing / windows.predicted)


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the most likely continuation of ``prompt``, token by token."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _log_probabilities(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of each next token: float32 [windows, context, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=rows[:, :-1].to(model.device), use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1)
