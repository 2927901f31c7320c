"""The methods by name. A new method is its own file and one line here."""

from typing import Any, Final

from mergefs.methods.contract import Method, Specification
from mergefs.methods.linear import Linear
from mergefs.methods.model_stock import ModelStock
from mergefs.methods.nearswap import NearSwap
from mergefs.methods.passthrough import Passthrough
from mergefs.methods.ram import Ram, RamPlus
from mergefs.methods.slerp import Slerp
from mergefs.methods.task_vector import (
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    DARE_LINEAR,
    DARE_TIES,
    DELLA,
    DELLA_LINEAR,
    TASK_ARITHMETIC,
    TIES,
)

_METHODS: Final[tuple[Method[Any], ...]] = (
    Linear(),
    Slerp(),
    TASK_ARITHMETIC,
    TIES,
    DARE_LINEAR,
    DARE_TIES,
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    DELLA,
    DELLA_LINEAR,
    ModelStock(),
    NearSwap(),
    Ram(),
    RamPlus(),
    Passthrough(),
)
METHODS: Final[dict[str, Method[Any]]] = {method.specification.name: method for method in _METHODS}


def method_names() -> tuple[str, ...]:
    """Return the names that ``merge_method`` may have."""
    return tuple(METHODS)


def specification(name: str) -> Specification | None:
    """Return the specification of the method called ``name``, or None when there is none."""
    method = METHODS.get(name)
    return method.specification if method else None
