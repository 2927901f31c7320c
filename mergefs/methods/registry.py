"""The methods by name: the built-in ones, and those that other packages register.

A new built-in method is its own file and one line here. Other packages are looked at only for a name that is not built
in, and to list them all; a built-in method is never replaced.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mergefs.errors import MethodError
from mergefs.methods.contract import Method, Specification
from mergefs.methods.plugins import Origin, Plugin, load, plugins

_PLACES: Final[Mapping[str, tuple[str, str]]] = {
    "linear": ("linear", "Linear"),
    "slerp": ("slerp", "Slerp"),
    "nuslerp": ("nuslerp", "Nuslerp"),
    "multislerp": ("multislerp", "Multislerp"),
    "karcher": ("karcher", "Karcher"),
    "task_arithmetic": ("task_vector", "TASK_ARITHMETIC"),
    "ties": ("task_vector", "TIES"),
    "dare_linear": ("task_vector", "DARE_LINEAR"),
    "dare_ties": ("task_vector", "DARE_TIES"),
    "breadcrumbs": ("task_vector", "BREADCRUMBS"),
    "breadcrumbs_ties": ("task_vector", "BREADCRUMBS_TIES"),
    "della": ("task_vector", "DELLA"),
    "della_linear": ("task_vector", "DELLA_LINEAR"),
    "sce": ("sce", "Sce"),
    "model_stock": ("model_stock", "ModelStock"),
    "nearswap": ("nearswap", "NearSwap"),
    "ram": ("ram", "Ram"),
    "ramplus_tl": ("ram", "RamPlus"),
    "arcee_fusion": ("arcee_fusion", "ArceeFusion"),
    "passthrough": ("passthrough", "Passthrough"),
}
"""For each built-in method its module, and what it is called there: the method itself, or its class."""


class _BuiltIn(Mapping[str, Method[Any]]):
    """The built-in methods by name. Each is imported when it is looked at: a recipe needs one of them."""

    def __init__(self) -> None:
        self._made: dict[str, Method[Any]] = {}

    def __getitem__(self, name: str) -> Method[Any]:
        if name not in self._made:
            module, attribute = _PLACES[name]
            found = getattr(importlib.import_module(f"mergefs.methods.{module}"), attribute)
            # Of threads that come at the same time all get the same.
            self._made.setdefault(name, found() if isinstance(found, type) else found)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)

    def __contains__(self, name: object) -> bool:
        return name in _PLACES


METHODS: Final[Mapping[str, Method[Any]]] = _BuiltIn()
"""The built-in methods. To find a method that a recipe names, use ``find_method``, which knows all of them."""


@dataclass(frozen=True, slots=True)
class RegisteredMethod:
    """A method and the package that it comes from, None for ours."""

    method: Method[Any]
    origin: Origin | None

    @property
    def specification(self) -> Specification:
        """What the method declares."""
        return self.method.specification


def find_method(name: str) -> RegisteredMethod | None:
    """Return the method called ``name``, or None when there is none.

    Raises MethodError where a package registers it and it cannot be used.
    """
    built_in = METHODS.get(name)
    if built_in is not None:
        return RegisteredMethod(built_in, None)
    found = [plugin for plugin in plugins() if plugin.name == name]
    if not found:
        return None
    if len(found) > 1:
        raise _registered_twice(found)
    return RegisteredMethod(load(found[0]), found[0].origin)


def get_method(name: str) -> Method[Any]:
    """Return the method called ``name``; MethodError when there is none, or when it cannot be used."""
    found = find_method(name)
    if found is None:
        raise MethodError(f"there is no merge method {name!r}; `mergefs methods` lists those that there are")
    return found.method


def method_origin(name: str) -> Origin | None:
    """Return the package that registers the method called ``name``; None for ours, and where there is none."""
    return None if name in METHODS else next((one.origin for one in plugins() if one.name == name), None)


def method_names() -> tuple[str, ...]:
    """Return the names that ``merge_method`` may have, the built-in ones first. No package is imported for it."""
    return tuple(dict.fromkeys((*METHODS, *(plugin.name for plugin in plugins()))))


def specification(name: str) -> Specification | None:
    """Return the specification of the method called ``name``, or None when there is none; MethodError as above."""
    found = find_method(name)
    return found.method.specification if found else None


def built_in_methods_with(parameter: str) -> tuple[str, ...]:
    """Return the names of the built-in methods that take ``parameter``."""
    return tuple(name for name, method in METHODS.items() if method.specification.parameter(parameter))


def registered_methods() -> tuple[tuple[RegisteredMethod, ...], tuple[MethodError, ...]]:
    """Return every method that can be used, and the reason for each that a package registers in vain."""
    usable = [RegisteredMethod(method, None) for method in METHODS.values()]
    problems: list[MethodError] = []
    for name in dict.fromkeys(plugin.name for plugin in plugins()):
        try:
            if name in METHODS:
                raise _shadowed(next(plugin for plugin in plugins() if plugin.name == name))
            found = find_method(name)
        except MethodError as error:
            problems.append(error)
        else:
            usable += [found] if found else []
    return tuple(usable), tuple(problems)


def _shadowed(plugin: Plugin) -> MethodError:
    return MethodError(
        f"merge method {plugin.name!r} of {plugin.origin} cannot be used, because a built-in method has that name; "
        "give it another name"
    )


def _registered_twice(found: list[Plugin]) -> MethodError:
    origins = " and ".join(str(plugin.origin) for plugin in found)
    return MethodError(f"merge method {found[0].name!r} is registered by {origins}; uninstall all but one of them")
