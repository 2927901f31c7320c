"""Variants: a recipe with other values, written on one line such as ``density=0.3,weight.2=0.5,budget=25%``."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from mergefs.errors import RecipeError
from mergefs.methods.registry import specification
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import parse_recipe
from mergefs.recipe.references import ModelReference
from mergefs.recipe.wording import listed, quote

BUDGET: Final = "budget"

_TOP_LEVEL: Final[Mapping[str, str]] = {"method": "merge_method", "dtype": "dtype", "out_dtype": "out_dtype"}
"""What may be changed beside parameters, and the recipe's key for it."""

_FORM: Final = "write KEY=VALUE pairs with commas between, such as density=0.3,weight.2=0.5,budget=25%"
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORD: Final = re.compile(r"[A-Za-z0-9_]+")

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Change:
    """One ``KEY=VALUE``: a parameter, of the model ``model`` or of all (None), or a key of ``_TOP_LEVEL``.

    ``model`` is the number of a model, from 1 in the recipe's order, or the last part of its path. ``value`` is a list
    for a gradient over the layers.
    """

    key: str
    model: str | None
    value: Value | list[Value]


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different about a recipe. ``text`` is as it was written; ``budget`` as in ``parse_budget``."""

    text: str
    changes: tuple[Change, ...]
    budget: str | None


def parse_variant(text: str) -> Variant:
    """Return the variant that ``text`` describes; RecipeError, which quotes it, where it describes none."""
    changes: list[Change] = []
    budget: str | None = None
    seen: set[str] = set()
    for part in text.split(","):
        name, equals, written = part.partition("=")
        if not equals or not name or not written:
            raise RecipeError(f"{quote(part)} is no change of a recipe; {_FORM}")
        if name in seen:
            raise RecipeError(f"{quote(name)} is changed twice; give one value")
        seen.add(name)
        key, dot, model = name.partition(".")
        if dot and not model:
            raise RecipeError(f"{quote(name)} names no model; write its number, as {key}.1, or its directory's name")
        if key == BUDGET and not dot:
            budget = written
            continue
        if key in _TOP_LEVEL and dot:
            raise RecipeError(f"{quote(key)} belongs to the whole recipe and not to one model; write {key}={written}")
        changes.append(Change(key, model or None, _value(written)))
    return Variant(text, tuple(changes), budget)


def vary(recipe: Recipe, variant: Variant) -> Recipe:
    """Return ``recipe`` with the changes of ``variant``; its text is that of the changed recipe.

    A parameter that is changed for all models loses the values that it has for single models, slices and modules.
    Where a file holds several merges, the final one is changed. Raises RecipeError for a parameter that the method does
    not have, a model that is not there, and whatever else makes no sound recipe.
    """
    origin = f"{recipe.origin}@{variant.text}"
    documents = [*yaml.safe_load_all(recipe.text)]
    document = next(one for one in documents if (one.get("name") or one.get("out_path")) == recipe.name)
    for change in variant.changes:
        _apply(change, document, recipe, origin)
    text = f"# {Path(recipe.origin).name} with {variant.text}\n" + yaml.safe_dump_all(
        documents, sort_keys=False, allow_unicode=True
    )
    return parse_recipe(text, origin, *recipe.directories)


def _value(written: str) -> Value | list[Value]:
    """Return a value; numbers with colons between are a gradient."""
    if ":" in written:
        return [_scalar(part) for part in written.split(":")]
    return _scalar(written)


def _scalar(written: str) -> Value:
    if written in ("true", "false"):
        return written == "true"
    if _NUMBER.fullmatch(written):
        number = float(written)
        if not math.isfinite(number):
            raise RecipeError(f"{quote(written)} is too large a number; {_FORM}")
        return int(written) if re.fullmatch(r"[+-]?[0-9]{1,18}", written) else number
    if _WORD.fullmatch(written):
        return written
    raise RecipeError(f"{quote(written)} is no value; {_FORM}")


def _apply(change: Change, document: dict[str, Any], recipe: Recipe, origin: str) -> None:
    """Make one change in the plain values of a recipe."""
    if change.key in _TOP_LEVEL:
        document[_TOP_LEVEL[change.key]] = change.value
        return
    method = specification(str(document["merge_method"]))
    if method is not None and method.parameter(change.key) is None:
        names = listed([*(parameter.name for parameter in method.parameters), BUDGET, *_TOP_LEVEL])
        raise RecipeError(f"{origin}: {quote(change.key)} can not be changed in a {method.name} merge; change {names}")
    if change.model is None:
        for table in _tables(document):
            (table.get("parameters") or {}).pop(change.key, None)
        _parameters(document)[change.key] = change.value
        return
    wanted = _named(change, recipe, origin)
    pairs = zip(_entries(document), recipe.models, strict=True)
    found = [entry for entry, listed_model in pairs if listed_model.model == wanted]
    if not found:
        raise RecipeError(
            f"{origin}: {quote(wanted.text)} has no entry of its own, so {quote(change.key)} cannot be changed for it; "
            "change it for a model that the recipe lists"
        )
    for entry in found:
        _parameters(entry)[change.key] = change.value


def _parameters(table: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of an entry, which may have none yet."""
    if not table.get("parameters"):
        table["parameters"] = {}
    parameters: dict[str, Any] = table["parameters"]
    return parameters


def _named(change: Change, recipe: Recipe, origin: str) -> ModelReference:
    """Return the model that a change is about."""
    models = [entry.model for entry in recipe.inputs()]
    name = str(change.model)
    if name.isdecimal() and 1 <= int(name) <= len(models):
        return models[int(name) - 1]
    matching = [model for model in models if _last_part(model) == name]
    if len(matching) == 1:
        return matching[0]
    known = listed([f"{number} ({_last_part(model)})" for number, model in enumerate(models, start=1)])
    trouble = "names several models" if matching else "is no model of the recipe"
    raise RecipeError(f"{origin}: {quote(name)} {trouble}; its models are {known}")


def _last_part(model: ModelReference) -> str:
    """Return the name of a model's directory."""
    return model.text.rstrip("/").rpartition("/")[2]


def _tables(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every table of a recipe that may have parameters."""
    for table in _modules(document):
        yield table
        yield from table.get("slices") or []
    yield from _entries(document)


def _modules(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the recipe itself and its modules: what may list models or slices."""
    yield document
    yield from (document.get("modules") or {}).values()


def _entries(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of models, in the order of ``Recipe.models``."""
    for table in _modules(document):
        yield from table.get("models") or []
        for part in table.get("slices") or []:
            yield from part["sources"]
