"""Sizes in bytes, written and read as people write them."""

import re
from typing import Final

_FACTORS: Final[dict[str, int]] = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Return the number of bytes that ``text`` names, such as ``8GiB``, ``500MB`` or ``1048576``.

    Raises ValueError, with a sentence for people, when it is not a size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write a number with a unit, such as 500MB or 8GiB")
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_size(size: int | float) -> str:
    """Return ``size`` bytes with a binary unit and three significant digits, such as ``1.25 GiB``."""
    value = float(size)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    if units[0] == "B":
        return f"{int(value)} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {units[0]}"


def format_duration(seconds: float) -> str:
    """Return a duration with its two largest units, such as ``2 d 5 h``."""
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
