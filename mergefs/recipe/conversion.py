"""Takes for numbers and truth values what mergekit takes for them, in the lax mode of the library that it checks with.

What has its type already, as nearly everything in a recipe, is taken as it is: loading that library takes longer than
planning a small merge.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def to_int(value: object) -> int:
    """Return a whole number, also of text and of floats without a fraction. Raises ValueError for anything else.

    True is not a number: that it is 1 is nothing that anybody means.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    if type(value) is int:
        return value
    number: int = _lax(int).validate_python(value)
    return number


def to_float(value: object) -> float:
    """Return a number, also of text; it may be infinite, or none (NaN). Raises ValueError for anything else.

    True is not a number, as above; nor is a whole number that is too large for a float.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    if type(value) is float:
        return value
    try:
        number: float = float(value) if type(value) is int else _lax(float).validate_python(value)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return number


def to_bool(value: object) -> bool:
    """Return a truth value, also of text such as "yes" and of 0 and 1. Raises ValueError for anything else."""
    if type(value) is bool:
        return value
    truth: bool = _lax(bool).validate_python(value)
    return truth


@cache
def _lax(kind: type) -> "TypeAdapter[Any]":
    """Return what converts to ``kind``; its ValidationError is a ValueError."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
