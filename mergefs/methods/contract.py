"""What a merge method declares.

A method is one declaration: its parameters, what it asks of its inputs, the statistics of whole tensors that it
needs, how those become a handful of coefficients for each tensor, and an elementwise kernel.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Scope(Enum):
    """Whom a parameter belongs to."""

    GLOBAL = "global"
    PER_MODEL = "per model"
    PER_EXPERT = "per expert"  # each model but the base


class BasePolicy(Enum):
    """What a method does with ``base_model``."""

    REQUIRED = "required"
    AS_INPUT = "as one more input"  # the base takes part like any other model
    OPTIONAL = "optional"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    ``default`` is None where ``required`` is set, and where leaving it out has a meaning of its own. ``minimum`` and
    ``maximum`` are inclusive.
    """

    name: str
    kind: Literal["float", "bool"]
    scope: Scope
    meaning: str
    required: bool = False
    default: float | bool | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Specification:
    """The part of a method that recipes are checked against.

    ``min_models`` and ``max_models`` count the distinct models of a recipe, the base among them.
    """

    name: str
    title: str
    reference: str
    summary: str
    parameters: tuple[Parameter, ...]
    base: BasePolicy
    min_models: int = 1
    max_models: int | None = None

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter called ``name``, or None."""
        return next((p for p in self.parameters if p.name == name), None)
