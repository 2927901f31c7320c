"""Parts of error sentences."""

from collections.abc import Iterable
from typing import Final

_LONGEST_QUOTE: Final = 120
_LONGEST_NAME: Final = 64  # comparing longer ones takes long, and no known name is near them


def quote(value: object) -> str:
    """Return ``value`` as Python writes it, cut short when it is long."""
    text = repr(value) if not isinstance(value, str) else repr(value[: _LONGEST_QUOTE + 1])
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Return ``names`` with commas, or ``none``; what a terminal would not show as it is in quotes."""
    return ", ".join(name if name.isprintable() else quote(name) for name in names) or "none"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` is most likely a slip of, or None."""
    from difflib import get_close_matches  # here, since only those who err need it

    if len(name) > _LONGEST_NAME:
        return None
    by_lowercase = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower().replace("-", "_"), by_lowercase, n=1, cutoff=0.6)
    return by_lowercase[matches[0]] if matches else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    candidates = tuple(known)
    match = nearest(name, candidates)
    return f"did you mean {match!r}?" if match else f"the known ones are {listed(candidates)}"
