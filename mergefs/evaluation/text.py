"""Held-out text as windows of tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergefs.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Windows:
    """``tokens``: int64 [windows, context + 1], of which the first of each row is only given.

    ``bytes_each`` is how many bytes of text one predicted token stands for, on average.
    """

    tokens: torch.Tensor
    bytes_each: float

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted."""
        rows, columns = self.tokens.shape
        return rows * (columns - 1)


def read_text(path: Path) -> str:
    """Return the text in a file; EvaluationError where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not UTF-8 text (at byte {error.start}); give plain text") from None
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); give a file of held-out text") from None


def cut_into_windows(text: str, tokenizer: Any, context: int, limit: int) -> Windows:
    """Return windows of ``context`` + 1 tokens that do not overlap, spread evenly over the text.

    At most ``limit`` tokens are predicted. Raises EvaluationError where the text is shorter than one window.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    size = context + 1
    available = tokens.numel() // size
    count = min(available, max(limit // context, 1))
    if count < 1:
        raise EvaluationError(
            f"the text has {tokens.numel()} tokens, and one window takes {size}; give more text or a smaller --context"
        )
    rows = tokens[: available * size].view(available, size)[torch.arange(count) * available // count]
    return Windows(rows, len(text.encode()) / max(tokens.numel(), 1))
