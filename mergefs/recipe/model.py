"""Recipes: mergekit's YAML configs, read strictly.

What mergekit ignores without a word (misspelt keys, parameters of other methods) is refused here, in a sentence
that gives the line, the nearest known name, and the remedy.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from mergefs.checkpoint.dtypes import FLOAT_DTYPES_BY_TORCH_NAME, DType
from mergefs.errors import MethodError, RecipeError
from mergefs.methods.contract import BasePolicy, Specification
from mergefs.methods.registry import method_names, specification
from mergefs.recipe import misplaced
from mergefs.recipe.definition import ModelInput, OutputModule, OutputSlice, Recipe
from mergefs.recipe.document import (
    MAXIMUM_SIZE,
    Entry,
    Item,
    Place,
    ScalarItem,
    TableItem,
    describe,
    empty,
    is_null,
    parse_documents,
    too_large,
)
from mergefs.recipe.keys import check_keys
from mergefs.recipe.references import ModelReference, locate, read_reference
from mergefs.recipe.setting_reader import read_settings
from mergefs.recipe.structure import STRUCTURE_KEYS, StructureReader
from mergefs.recipe.tokenizer import check_token_sources, read_chat_template, read_tokenizer
from mergefs.recipe.wording import listed, quote, suggestion

__all__ = [
    "ModelInput",
    "ModelReference",
    "OutputModule",
    "OutputSlice",
    "Recipe",
    "find_model",
    "load_recipe",
    "parse_recipe",
]

_KEYS: Final = (
    *("merge_method", *STRUCTURE_KEYS, "base_model", "dtype", "out_dtype", "parameters", "name", "out_path"),
    *("tokenizer", "tokenizer_source", "chat_template"),
)


def load_recipe(path: Path, current: Path | None = None) -> Recipe:
    """Return the recipe in the file at ``path``; RecipeError when it cannot be read or is not a sound recipe.

    Relative paths of models count from the directory ``current``, by default this process's, and then from the
    recipe's own.
    """
    origin = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAXIMUM_SIZE + 1)
    except FileNotFoundError:
        raise RecipeError(f"{origin}: there is no such recipe; give the path of a mergekit YAML file") from None
    except IsADirectoryError:
        raise RecipeError(f"{origin}: is a directory, not a recipe; give the YAML file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{origin}: cannot be read ({reason}); give a mergekit YAML file") from None
    if len(data) > MAXIMUM_SIZE:
        raise too_large(origin)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Place(origin, line).error(
            f"byte 0x{data[error.start]:02x} is not UTF-8; save the recipe as UTF-8 text"
        ) from None
    directories = _directories(path, current)
    for known in (path, *directories):
        _refuse_other_bytes(known, origin)
    return parse_recipe(text, origin, *directories)


def _refuse_other_bytes(path: Path, origin: str) -> None:
    """Refuse a path that is no text: what is known of plans is kept as text, with the paths that it counts from."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RecipeError(
            f"{origin}: the path {path} has bytes that are not UTF-8; rename the file or directory"
        ) from None


def _directories(path: Path, current: Path | None) -> tuple[Path, ...]:
    """Return the current directory, that of the recipe, and that of the file which a symbolic link there stands for."""
    own, real = path.absolute().parent, path.resolve()
    found = [own, real.parent] if path.is_symlink() and real.is_file() else [own]
    if current is None:
        with contextlib.suppress(FileNotFoundError):  # where it was removed under us
            current = Path.cwd()
    return tuple(dict.fromkeys([*([current] if current is not None else []), *found]))


def find_model(reference: ModelReference, recipe: Recipe) -> Path:
    """Return the absolute path of the directory that holds ``reference``.

    Relative paths count from the directory that was current, as in mergekit, then from the recipe's own. A name on the
    Hugging Face Hub is looked for in the local cache. Raises RecipeError that names each place that was tried.
    """
    return locate(reference, recipe.origin, *recipe.directories)


def parse_recipe(text: str, origin: str, *directories: Path) -> Recipe:
    """Return the recipe that ``text`` holds; every RecipeError starts with ``origin`` and, where known, the line.

    Of several documents it is the one without a name, or else the one whose result no other merges; the others are
    its ``inner`` recipes.
    """
    documents = [_table(item, origin) for item in parse_documents(text, origin)]
    recipes = [_recipe(document, text, origin, directories) for document in documents]
    if len(recipes) == 1:
        return recipes[0]
    return _joined(recipes, documents)


def _table(document: Item, origin: str) -> TableItem:
    if is_null(document):
        raise empty(origin)
    if not isinstance(document, TableItem):
        raise document.place.error(
            f"a recipe is a mapping with merge_method and models, not {describe(document)}; write mergekit YAML"
        )
    return document


def _recipe(document: TableItem, text: str, origin: str, directories: tuple[Path, ...]) -> Recipe:
    """Return the recipe of one document, without those that it may refer to."""
    if document.get("merge_method") is not None:
        _method(document)  # a method that is not known explains keys that are not known either
    check_keys(document, _KEYS, misplaced.in_recipes, "a recipe")
    method = _method(document)
    base_entry = document.get("base_model")
    base = None if base_entry is None else read_reference(base_entry)
    sliced = any(document.get(key) is not None for key in ("slices", "modules"))
    if base is None and method.base is BasePolicy.REQUIRED and not sliced:
        raise document.place.error(
            f"merge_method {method.name} needs a base model; add `base_model: PATH` at top level"
        )
    parameters = read_settings(document.get("parameters"), method, None)
    recipe = Recipe(
        method=method.name,
        modules=StructureReader(method, base, parameters).read(document),
        base=base,
        dtype=_dtype(document.get("dtype")),
        out_dtype=_dtype(document.get("out_dtype")),
        parameters=parameters,
        text=text,
        origin=origin,
        directories=directories,
        name=_name(document),
        tokenizer=read_tokenizer(document),
        chat_template=read_chat_template(document.get("chat_template")),
    )
    if recipe.tokenizer is not None:
        check_token_sources(recipe.tokenizer, [entry.model for entry in recipe.inputs()])
    return recipe


def _name(document: TableItem) -> str | None:
    """Return what other documents of the file call the result by: ``name``, or ``out_path`` as mergekit-mega has it."""
    entry = document.get("name") or document.get("out_path")
    return None if entry is None else _text(entry, "a name that other documents of this file call the result by")


def _joined(recipes: Sequence[Recipe], documents: Sequence[TableItem]) -> Recipe:
    """Return the final recipe of several documents, with the others as its ``inner`` ones."""
    named: dict[str, Recipe] = {}
    final: Recipe | None = None
    for recipe, document in zip(recipes, documents, strict=True):
        if recipe.name is None and final is not None:
            raise document.place.error(
                "a second document without a name starts here, so it is not clear which is the result; give all but "
                "one "
                "of them a `name`"
            )
        if recipe.name is None:
            final = recipe
        elif recipe.name in named:
            raise document.place.error(
                f"the name {quote(recipe.name)} is taken by another document of this file; choose another one"
            )
        else:
            named[recipe.name] = recipe
    places = {recipe.name: document.place for recipe, document in zip(recipes, documents, strict=True)}
    used = {name for recipe in recipes for name in _used(recipe, named)}
    if final is None:
        results = [recipe for name, recipe in named.items() if name not in used]
        if len(results) != 1:
            names = listed(quote(recipe.name) for recipe in results)
            raise documents[0].place.error(
                "every document of this file has a name and "
                f"{'no other merges ' + names if results else 'all are merged'}"
                ", so it is not clear which is the result; leave out the `name` of that one"
            )
        final = results[0]
    return _with_inner(final, named, (), places)


def _used(recipe: Recipe, named: Mapping[str, Recipe]) -> list[str]:
    """Return the names of other documents that a recipe merges the results of."""
    references = [*(entry.model for entry in recipe.inputs()), *recipe.bases]
    return list(dict.fromkeys(reference.path for reference in references if reference.path in named))


def _with_inner(
    recipe: Recipe, named: Mapping[str, Recipe], outer: tuple[str | None, ...], places: Mapping[str | None, Place]
) -> Recipe:
    """Return ``recipe`` with the recipes that it merges the results of, each with its own."""
    if recipe.name in outer:
        circle = " -> ".join(str(name) for name in (*outer[outer.index(recipe.name) :], recipe.name))
        raise places[recipe.name].error(f"the documents of this file merge each other in a circle ({circle}); break it")
    if recipe.name is not None:
        outer = (*outer, recipe.name)
    inner = {name: _with_inner(named[name], named, outer, places) for name in _used(recipe, named)}
    return replace(recipe, inner=MappingProxyType(inner))


def _method(document: TableItem) -> Specification:
    entry = document.get("merge_method")
    if entry is None:
        raise document.place.error(f"the recipe has no merge_method; add one of {listed(method_names())}")
    name = _text(entry, "the name of a method (`mergefs methods` lists them)")
    try:
        found = specification(name)
    except MethodError as error:
        raise entry.value.place.error(str(error)) from error
    if found is not None:
        return found
    known = method_names()
    raise entry.value.place.error(f"{quote(name)} is not a merge_method; {suggestion(name, known)}")


def _dtype(entry: Entry | None) -> DType | None:
    if entry is None:
        return None
    wanted = f"one of {listed(FLOAT_DTYPES_BY_TORCH_NAME)}"
    name = _text(entry, wanted)
    found = FLOAT_DTYPES_BY_TORCH_NAME.get(name.removeprefix("torch."))
    if found is None:
        raise entry.value.place.error(f"{entry.key!r} must be {wanted}, not {quote(name)}; change it")
    return found


def _text(entry: Entry, wanted: str) -> str:
    item = entry.value
    if not isinstance(item, ScalarItem) or not isinstance(item.value, str):
        raise item.place.error(f"{entry.key!r} must be {wanted}, not {describe(item)}; change it")
    return item.value
