"""What the parameters of a recipe come to for one tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from mergefs.errors import RecipeError
from mergefs.methods.contract import Parameter, Scope, Specification
from mergefs.recipe.definition import ModelInput, OutputModule, OutputSlice, Recipe
from mergefs.recipe.settings import (
    Condition,
    Conditions,
    Gradient,
    Scalar,
    Setting,
    Settings,
    evaluate,
    filters,
    longest_gradient,
)
from mergefs.recipe.wording import nearest, quote

__all__ = [
    "Condition",
    "Conditions",
    "Gradient",
    "ResolvedParameters",
    "Scalar",
    "Setting",
    "Settings",
    "Values",
    "evaluate",
    "resolve_parameters",
    "unmatched_filters",
]

Values: TypeAlias = Mapping[str, float | bool | None]


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """The parameters of one tensor: those of the whole merge, and those of each of the slice's ``inputs()``.

    A value is None where the parameter is left out and that has a meaning of its own. A parameter that belongs to
    experts alone is not among the base's.
    """

    shared: Values
    per_model: tuple[Values, ...]


def resolve_parameters(
    recipe: Recipe,
    specification: Specification,
    tensor_name: str,
    t: float,
    module: OutputModule | None = None,
    part: OutputSlice | None = None,
    input_names: Sequence[str] | None = None,
) -> ResolvedParameters:
    """Return what every parameter comes to for ``tensor_name`` at the layer position ``t`` (0 to 1).

    It belongs to the slice ``part`` of ``module``, by default the first of each. A model's own entry comes before
    its slice, that before the module, that before the top level, and that before the default. Parameters of a model
    are filtered by the tensor's name in that model, which ``input_names`` gives where it is another. Raises RecipeError
    when a required parameter has no value for this tensor.
    """
    module = module or recipe.modules[0]
    part = part or module.slices[0]
    inputs = part.inputs()
    names = input_names if input_names is not None else [tensor_name] * len(inputs)
    outer = (part.parameters, module.parameters, recipe.parameters)
    shared = {
        parameter.name: _resolve(parameter, outer, recipe, None, tensor_name, t)
        for parameter in specification.parameters
        if parameter.scope is Scope.GLOBAL
    }
    per_model = tuple(
        MappingProxyType(
            {
                parameter.name: _resolve(parameter, (entry.parameters, *outer), recipe, entry, name, t)
                for parameter in specification.parameters
                if _applies(parameter, entry, part)
            }
        )
        for entry, name in zip(inputs, names, strict=True)
    )
    return ResolvedParameters(MappingProxyType(shared), per_model)


def unmatched_filters(recipe: Recipe, tensor_names: Iterable[str]) -> tuple[str, ...]:
    """Return the filters of ``recipe`` that select none of ``tensor_names``, each once, in the recipe's order."""
    names = tuple(tensor_names)
    wanted = dict.fromkeys(_all_filters(recipe))
    return tuple(text for text in wanted if not any(text in name for name in names))


def filter_notes(recipe: Recipe, tensor_names: Iterable[str]) -> tuple[str, ...]:
    """Return what is worth telling of filters: those that select none of ``tensor_names``.

    Nothing is wrong with them for sure, since one recipe serves models of several kinds: the output embedding that a
    filter names is missing where it is tied.
    """
    names = sorted(tensor_names)
    parts = dict.fromkeys(part for name in names for part in name.split("."))
    notes: list[str] = []
    for text in unmatched_filters(recipe, names):
        match = nearest(text, parts)
        hint = (
            f"did you mean {match!r}?" if match else f"names of tensors are such as {max(names, key=len, default='')}"
        )
        notes.append(f"{recipe.origin}: the filter {quote(text)} matches no tensor, so its value is not used; {hint}")
    return tuple(notes)


def gradient_notes(recipe: Recipe, number_of_layers: int | None) -> tuple[str, ...]:
    """Return what is worth telling of gradients: those with more values than there are layers to take them.

    ``number_of_layers`` is that of whole models.
    """
    notes: list[str] = []
    for module in recipe.modules:
        for part in module.slices:
            start, stop = part.sources[0].layers or (0, number_of_layers or 0)
            levels = (*(source.parameters for source in part.sources), part.parameters, module.parameters)
            for settings in (*levels, recipe.parameters):
                for name, setting in settings.items():
                    length = longest_gradient(setting)
                    if 0 < stop - start < length:
                        notes.append(
                            f"{recipe.origin}: a gradient of {name!r} has {length} values for {stop - start} layers, "
                            "so "
                            "not every value is met"
                        )
    return tuple(dict.fromkeys(notes))


def _all_filters(recipe: Recipe) -> Iterator[str]:
    for settings in recipe.settings():
        for setting in settings.values():
            yield from filters(setting)


def _applies(parameter: Parameter, entry: ModelInput, part: OutputSlice) -> bool:
    if parameter.scope is Scope.PER_EXPERT:
        return entry.model != part.base
    return parameter.scope is Scope.PER_MODEL


_EXAMPLES: Final = {"float": "1.0", "int": "1", "bool": "true"}


def _resolve(
    parameter: Parameter,
    levels: tuple[Settings, ...],
    recipe: Recipe,
    entry: ModelInput | None,
    tensor_name: str,
    t: float,
) -> float | bool | None:
    for settings in levels:
        if parameter.name in settings:
            value = evaluate(settings[parameter.name], tensor_name, t)
            if isinstance(value, str):
                raise TypeError(f"parameter {parameter.name} was not converted when the recipe was read")
            if isinstance(value, float) and parameter.kind == "int":
                return _whole(value, parameter, recipe, tensor_name)
            if value is not None:
                return value
    if not parameter.required:
        return parameter.default
    whose = "" if entry is None else f" of model {quote(entry.model.text)}"
    where = "the 'parameters' at top level" if entry is None else "the 'parameters' of that model or at top level"
    raise RecipeError(
        f"{recipe.origin}: the parameter {parameter.name!r}{whose} has no value for tensor {quote(tensor_name)}, "
        f"because none of its filters selects that name; add a last condition without a filter, such as "
        f"`- value: {_EXAMPLES[parameter.kind]}`, in {where}"
    )


def _whole(value: float, parameter: Parameter, recipe: Recipe, tensor_name: str) -> int:
    """Return a whole number that a gradient comes to."""
    if not value.is_integer():
        raise RecipeError(
            f"{recipe.origin}: the gradient of {parameter.name!r} comes to {value:g} for tensor {quote(tensor_name)}, "
            "and it must be a whole number everywhere; give one number, or conditions with a filter"
        )
    return int(value)
