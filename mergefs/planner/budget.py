"""Budgets: how many bytes of experts one full read of the merged model may cost."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from mergefs.errors import BudgetError
from mergefs.units import parse_size

_SHARE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,99})?|\.[0-9]{1,99})\s*%")


@dataclass(frozen=True, slots=True)
class Budget:
    """A number of bytes, or a share of all expert bytes (1 is all of them)."""

    size: int | None
    share: Fraction | None

    def limit(self, total: int) -> int:
        """Return the bytes that may be read when the experts hold ``total``."""
        if self.share is not None:
            # Exact, and rounded down: a cap is never exceeded by a byte.
            return int(self.share * total)
        return self.size or 0


def parse_budget(text: str) -> Budget:
    """Return the budget that ``text`` names, such as ``25%``, ``8GiB`` or ``0``; BudgetError when it names none."""
    stripped = text.strip()
    if stripped.endswith("%"):
        match = _SHARE.fullmatch(stripped)
        share = Fraction(match[1]) / 100 if match else None
        if share is None or share > 1:
            raise BudgetError(
                f"budget {text!r} is not between 0% and 100%; write a share such as 25%, or a size such as 8GiB"
            )
        return Budget(None, share)
    try:
        return Budget(parse_size(stripped), None)
    except ValueError:
        raise BudgetError(f"budget {text!r} is neither a share nor a size; write it like 25%, 500MB or 8GiB") from None
