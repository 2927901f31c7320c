"""The types of what kernels are given. They know nothing of the compiler, which most processes never load."""

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number that is passed by value, by the name that numba and numpy have for its type."""

    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a structured array, by the fields of its numpy dtype."""

    fields: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Array:
    """A contiguous array, in the order of C; kernels write to none that is ``readonly``."""

    element: Scalar | Record
    dimensions: int
    layout: Literal["C"] = "C"
    readonly: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """What numpy calls the type of the elements."""
        if isinstance(self.element, Record):
            return self.element.fields
        return np.dtype("bool" if self.element == boolean else self.element.name)


Type: TypeAlias = Scalar | Array
Signature: TypeAlias = tuple[Type, ...]

boolean: Final = Scalar("boolean")
uint8: Final = Scalar("uint8")
int8: Final = Scalar("int8")
uint16: Final = Scalar("uint16")
int16: Final = Scalar("int16")
uint32: Final = Scalar("uint32")
int32: Final = Scalar("int32")
uint64: Final = Scalar("uint64")
int64: Final = Scalar("int64")
float32: Final = Scalar("float32")
float64: Final = Scalar("float64")


def void(*arguments: Type) -> Signature:
    """Return the signature of a kernel that leaves its results in the arrays that it is given."""
    return arguments
