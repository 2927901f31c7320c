"""Merge methods that other installed packages register by an entry point of the group ``mergefs.methods``.

Looking for them reads the metadata of every installed package, and using one runs its code, so neither happens before
a name is asked for that is not built in.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

from mergefs.errors import MethodError
from mergefs.methods.contract import Method, Specification

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

GROUP: Final = "mergefs.methods"

_LONGEST_REASON: Final = 200


@dataclass(frozen=True, slots=True)
class Origin:
    """The installed package that a method comes from."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A method that a package registers, by the name of its entry point; nothing of it is imported yet."""

    name: str
    origin: Origin
    entry_point: EntryPoint


def plugins() -> tuple[Plugin, ...]:
    """Return what installed packages register, sorted by name."""
    return _plugins(tuple(sys.path))


@lru_cache(maxsize=1)
def _plugins(path: tuple[str, ...]) -> tuple[Plugin, ...]:
    from importlib.metadata import distributions

    # As on import, the first of several installations of a package hides the others.
    found: dict[str, tuple[Plugin, ...]] = {}
    for distribution in distributions(path=list(path)):
        registered = _registered_by(distribution)
        if registered:
            found.setdefault(registered[0].origin.distribution, registered)
    return tuple(sorted((one for some in found.values() for one in some), key=lambda one: (one.name, str(one.origin))))


def _registered_by(distribution: Distribution) -> tuple[Plugin, ...]:
    """Return what one package registers; nothing where its metadata is damaged, which is not for us to tell."""
    try:
        entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        # Reading the rest of the metadata takes long, for all the packages that register nothing.
        origin = Origin(distribution.metadata["Name"], distribution.version) if entries else None
    except Exception:  # whatever a damaged file makes the parser raise
        return ()
    return tuple(Plugin(entry.name, origin, entry) for entry in entries if origin is not None)


def load(plugin: Plugin) -> Method[Any]:
    """Import and return the method of ``plugin``, once in a process; MethodError where that is impossible."""
    return _load(plugin)


@cache
def _load(plugin: Plugin) -> Method[Any]:
    value = plugin.entry_point.value
    try:
        found = plugin.entry_point.load()
        method = found if isinstance(found, Method) else found() if callable(found) else None
    except (Exception, SystemExit) as error:
        raise _unusable(plugin, f"{value} fails ({_reason(error)})") from error
    if not isinstance(method, Method):
        raise _unusable(plugin, f"{value} is neither a Method nor a function without arguments that returns one")
    specification = getattr(method, "specification", None)
    if not isinstance(specification, Specification):
        raise _unusable(plugin, f"the specification of {value} is no Specification")
    if specification.name != plugin.name:
        raise _unusable(
            plugin, f"its entry point is called {plugin.name!r} and its specification {specification.name!r}"
        )
    return method


def blamed_for(error: BaseException) -> Origin | None:
    """Return the package whose method raised ``error``, or called what did; None where none was involved."""
    modules = {plugin.entry_point.module.partition(".")[0]: plugin.origin for plugin in plugins()}
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        origin = modules.get(module.partition(".")[0])
        if origin is not None:
            return origin
        trace = trace.tb_next
    return None


def _unusable(plugin: Plugin, reason: str) -> MethodError:
    return MethodError(
        f"merge method {plugin.name!r} of {plugin.origin} cannot be used, because {reason}; "
        f"repair {plugin.origin.distribution}, or uninstall it"
    )


def _reason(error: BaseException) -> str:
    """Return the kind of ``error`` and the beginning of what it says, on one line."""
    text = " ".join(str(error).split())
    shortened = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {shortened}" if text else type(error).__name__
