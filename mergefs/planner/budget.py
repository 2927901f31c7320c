"""Budgets: how many bytes of experts one full read of the merged model may cost."""

from dataclasses import dataclass

from mergefs.errors import BudgetError
from mergefs.units import parse_size


@dataclass(frozen=True, slots=True)
class Budget:
    """A number of bytes, or a share of all expert bytes."""

    size: int | None
    share: float | None

    def limit(self, total: int) -> int:
        """Return the bytes that may be read when the experts hold ``total``."""
        if self.share is not None:
            # Rounded down: a cap is never exceeded by a byte.
            return total if self.share >= 1 else int(self.share * total)
        return self.size or 0


def parse_budget(text: str) -> Budget:
    """Return the budget that ``text`` names, such as ``25%``, ``8GiB`` or ``0``; BudgetError when it names none."""
    stripped = text.strip()
    if stripped.endswith("%"):
        try:
            share = float(stripped[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise BudgetError(
                f"budget {text!r} is not between 0% and 100%; write a share such as 25%, or a size such as 8GiB"
            )
        return Budget(None, share)
    try:
        return Budget(parse_size(stripped), None)
    except ValueError:
        raise BudgetError(f"budget {text!r} is neither a share nor a size; write it like 25%, 500MB or 8GiB") from None
