"""What kernels call: other functions that become a part of them, and single instructions.

Both are plain objects of Python that only carry a mark. The compiler puts its own in their place when it has to compile
a kernel (``mergefs.kernels.fused.compiler``); a process that finds the machine code on disk never loads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_INLINED: Final[set[Callable[..., Any]]] = set()


def inlined(function: _Function) -> _Function:
    """Make ``function`` a part of the kernels that call it; it is compiled with them."""
    _INLINED.add(function)
    return function


def is_inlined(found: object) -> bool:
    """Return whether ``found`` is a function that becomes a part of kernels."""
    return callable(found) and found in _INLINED


@dataclass(frozen=True, slots=True)
class Instruction:
    """An operation that ``mergefs.kernels.fused.instructions`` generates code for, under the same name."""

    name: str

    def __call__(self, *operands: Any) -> Any:
        """Raise TypeError: there is code of it in kernels only."""
        raise TypeError(f"{self.name} is an instruction of compiled kernels, and cannot be called from Python")


def instruction(function: Callable[..., Any]) -> Instruction:
    """Declare an instruction by a function that has nothing but a name, parameters and what they mean."""
    return Instruction(function.__name__)
