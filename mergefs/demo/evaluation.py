"""What the demo says of a model: its perplexity on held-out text, and a line that it writes."""

import copy
import math
from typing import Any

import torch

from mergefs.errors import MergefsError


def perplexity(model: Any, held_out: bytes, *, context: int, batch: int, limit_bytes: int) -> float:
    """Return the perplexity for each byte of ``held_out``, computed in float32.

    The text is cut into windows of ``context`` + 1 bytes that do not overlap; the first byte of each is only given.
    At most ``limit_bytes`` bytes are used, in windows spread evenly over the text, and ``batch`` windows at a time.
    Models in another dtype are converted in a copy, so the caller's model stays as it is.
    Raises MergefsError when the text or the limit is shorter than one window.
    """
    size = context + 1
    available, wanted = len(held_out) // size, limit_bytes // size
    if min(available, wanted) < 1:
        raise MergefsError(
            f"the held-out text has {len(held_out)} bytes, of which {limit_bytes} may be used, and one window takes "
            f"{size}; give more text or a shorter context"
        )
    text = torch.frombuffer(bytearray(held_out), dtype=torch.uint8)[: available * size].view(available, size)
    count = min(available, wanted)
    windows = text[torch.arange(count) * available // count].long()
    model = _in_float32(model)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, count, batch):
            rows = windows[start : start + batch]
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            )
            total += losses.item()
    return math.exp(total / (count * context))


def generate_line(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 60) -> str:
    """Return the ``prompt`` and the most likely continuation of ``tokens`` tokens, cut where its line ends.

    The model's evaluation mode is set, and its dtype is used as it is.
    """
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    continuation = generated[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(continuation, skip_special_tokens=True)
    return prompt + text.split("\n", 1)[0]


def _in_float32(model: Any) -> Any:
    """Return ``model`` in evaluation mode, or a float32 copy of it where it has weights of another dtype."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    return model.eval()
