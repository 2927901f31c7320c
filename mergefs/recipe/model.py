"""Recipes: mergekit's YAML configs, read strictly.

What mergekit ignores without a word (misspelt keys, parameters of other methods) is refused here, in a sentence
that gives the line, the nearest known name, and the remedy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.checkpoint.dtypes import FLOAT_DTYPES_BY_TORCH_NAME, DType
from mergefs.errors import MethodError, RecipeError
from mergefs.methods.contract import BasePolicy, Parameter, Scope, Specification
from mergefs.methods.registry import method_names, specification
from mergefs.recipe.document import (
    MAXIMUM_SIZE,
    Entry,
    Place,
    ScalarItem,
    SequenceItem,
    TableItem,
    describe,
    empty,
    is_null,
    parse_document,
    too_large,
)
from mergefs.recipe.references import ModelReference, locate, read_reference
from mergefs.recipe.setting_reader import NO_SETTINGS, read_settings
from mergefs.recipe.settings import Settings
from mergefs.recipe.wording import listed, nearest, quote, suggestion

__all__ = ["ModelInput", "ModelReference", "Recipe", "find_model", "load_recipe", "parse_recipe"]

_KEYS: Final = ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters")
_MODEL_KEYS: Final = ("model", "parameters")
_KEEP_TOKENIZER: Final = (
    "remove the key, and the merged model keeps the tokenizer of the base (without one, of the first model)"
)
_LATER_KEYS: Final = {
    "slices": "this version does not assemble models from slices of layers yet; list whole models under 'models'",
    "modules": "this version does not merge modules apart from each other yet; list whole models under 'models'",
    "tokenizer": f"this version does not build merged tokenizers yet; {_KEEP_TOKENIZER}",
    "tokenizer_source": f"this version does not build merged tokenizers yet; {_KEEP_TOKENIZER}",
    "chat_template": "this version does not write chat templates yet; remove the key, and the tokenizer's own stays",
    "name": (
        "names are for recipes of several steps, which this version does not do yet; remove the key, and write one "
        "file for each merge"
    ),
}
_LATER_MODEL_KEYS: Final = {
    "layer_range": "this version does not merge ranges of layers yet; remove the key to merge whole models",
    "lora": (
        "this version does not apply adapters (LoRA) yet; merge the adapter into its model first, and name the result"
    ),
}
# Only to tell a method that is still to come from a slip of the pen.
_MERGEKIT_METHODS: Final = frozenset(
    {
        *("linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "passthrough", "model_stock"),
        *("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"),
        *("della", "della_linear", "sce", "ram", "ramplus_tl", "arcee_fusion"),
    }
)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model that takes part in a merge, with the settings of its own entry."""

    model: ModelReference
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge and how; ``models`` as they are listed.

    ``text`` is the file verbatim, ``origin`` its path (or ``<recipe>``), ``directory`` the directory that it is in.
    """

    method: str
    models: tuple[ModelInput, ...]
    base: ModelReference | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: Settings
    text: str
    origin: str
    directory: Path | None

    def inputs(self) -> tuple[ModelInput, ...]:
        """Return the models that take part: those listed, then the base when it is not among them."""
        if self.base is None or any(entry.model == self.base for entry in self.models):
            return self.models
        return (*self.models, ModelInput(self.base, NO_SETTINGS))


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in the file at ``path``; RecipeError when it cannot be read or is not a sound recipe."""
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
    return parse_recipe(text, origin, path.absolute().parent)


def find_model(reference: ModelReference, recipe: Recipe) -> Path:
    """Return the absolute path of the directory that holds ``reference``.

    Relative paths count from the current directory, as in mergekit, then from the recipe's own. A name on the
    Hugging Face Hub is looked for in the local cache. Raises RecipeError that names each place that was tried.
    """
    return locate(reference, recipe.origin, recipe.directory)


def parse_recipe(text: str, origin: str, directory: Path | None = None) -> Recipe:
    """Return the recipe that ``text`` holds; every RecipeError starts with ``origin`` and, where known, the line."""
    document = parse_document(text, origin)
    if is_null(document):
        raise empty(origin)
    if not isinstance(document, TableItem):
        raise document.place.error(
            f"a recipe is a mapping with merge_method and models, not {describe(document)}; write mergekit YAML"
        )
    _check_keys(document, _KEYS, _LATER_KEYS, "a recipe")
    method = _method(document)
    base_entry = document.get("base_model")
    base = None if base_entry is None else read_reference(base_entry)
    if base is None and method.base is BasePolicy.REQUIRED:
        raise document.place.error(
            f"merge_method {method.name} needs a base model; add `base_model: PATH` at top level"
        )
    models_entry = document.get("models")
    if models_entry is None:
        raise document.place.error("the recipe has no models; list them under 'models', each as `- model: PATH`")
    recipe = Recipe(
        method=method.name,
        models=_models(models_entry, method),
        base=base,
        dtype=_dtype(document.get("dtype")),
        out_dtype=_dtype(document.get("out_dtype")),
        parameters=read_settings(document.get("parameters"), method, None),
        text=text,
        origin=origin,
        directory=directory,
    )
    _check_number_of_models(recipe, method, models_entry.place)
    _check_required(recipe, method, models_entry)
    return recipe


def _check_keys(table: TableItem, known: tuple[str, ...], later: dict[str, str], what: str) -> None:
    for entry in table:
        if entry.key in later:
            # mergekit writes keys that are not set as null or as empty lists.
            if not is_null(entry.value) and not (isinstance(entry.value, SequenceItem) and not entry.value.items):
                raise entry.place.error(f"{entry.key!r} cannot be used, because {later[entry.key]}")
        elif entry.key not in known:
            match = nearest(entry.key, (*known, *later))
            hint = f"did you mean {match!r}?" if match else suggestion(entry.key, known)
            raise entry.place.error(f"{quote(entry.key)} is not a key of {what}; {hint}")


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
    if name in _MERGEKIT_METHODS:
        raise entry.value.place.error(
            f"merge_method {name} is not in this version yet; it has {listed(known)}, so choose one of them"
        )
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


def _models(entry: Entry, method: Specification) -> tuple[ModelInput, ...]:
    if not isinstance(entry.value, SequenceItem):
        raise entry.value.place.error(
            f"'models' must be a list, not {describe(entry.value)}; write each model as `- model: PATH`"
        )
    if not entry.value.items:
        raise entry.place.error("'models' is empty; list at least one model, each as `- model: PATH`")
    inputs: list[ModelInput] = []
    lines: dict[ModelReference, int] = {}
    for item in entry.value.items:
        if not isinstance(item, TableItem):
            raise item.place.error(
                f"an entry of 'models' must be a mapping, not {describe(item)}; write `- model: PATH`"
            )
        _check_keys(item, _MODEL_KEYS, _LATER_MODEL_KEYS, "a model's entry")
        model_entry = item.get("model")
        if model_entry is None:
            raise item.place.error("this entry of 'models' names no model; add `model: PATH` to it")
        model = read_reference(model_entry)
        if model in lines:
            raise model_entry.place.error(
                f"model {quote(model.text)} is listed for the second time, first in line {lines[model]}; keep one "
                "entry and add up the weights"
            )
        lines[model] = model_entry.place.line
        inputs.append(ModelInput(model, read_settings(item.get("parameters"), method, model.text)))
    return tuple(inputs)


def _check_number_of_models(recipe: Recipe, method: Specification, place: Place) -> None:
    number = len(recipe.inputs())
    low, high = method.min_models, method.max_models
    if number >= low and (high is None or number <= high):
        return
    bound = low if number < low else high
    limit = "exactly" if low == high else "at least" if number < low else "at most"
    names = listed(entry.model.text for entry in recipe.inputs()[:8])
    raise place.error(
        f"merge_method {method.name} takes {limit} {bound} {'model' if bound == 1 else 'models'}, the base "
        f"counted, and this recipe has {number} ({names}{', ...' if number > 8 else ''}); "
        f"{'add' if number < low else 'remove'} models"
    )


def _check_required(recipe: Recipe, method: Specification, models: Entry) -> None:
    """Refuse, before any file is opened, a recipe that can have no value for a required parameter."""
    items = models.value.items if isinstance(models.value, SequenceItem) else ()
    places = dict(zip((entry.model for entry in recipe.models), (item.place for item in items), strict=True))
    for parameter in method.parameters:
        if not parameter.required or parameter.name in recipe.parameters:
            continue
        if parameter.scope is Scope.GLOBAL:
            raise models.place.error(_missing(parameter, method, None))
        for entry in recipe.inputs():
            applies = parameter.scope is Scope.PER_MODEL or entry.model != recipe.base
            if applies and parameter.name not in entry.parameters:
                raise places.get(entry.model, models.place).error(_missing(parameter, method, entry.model))


def _missing(parameter: Parameter, method: Specification, model: ModelReference | None) -> str:
    need = f"merge_method {method.name} needs the parameter {parameter.name!r} ({parameter.meaning})"
    if model is None:
        return f"{need}; set it in the 'parameters' at top level"
    return (
        f"{need} for model {quote(model.text)}; set it in the 'parameters' of that model, or for all models in the "
        "'parameters' at top level"
    )
