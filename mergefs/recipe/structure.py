"""Reads what a recipe merges: ``models``, ``slices`` and ``modules``."""

import os
from typing import Final

from mergefs.methods.contract import BasePolicy, Parameter, Scope, Specification
from mergefs.recipe import misplaced
from mergefs.recipe.conversion import to_int
from mergefs.recipe.definition import ModelInput, OutputModule, OutputSlice
from mergefs.recipe.document import Entry, Item, Place, ScalarItem, SequenceItem, TableItem, describe
from mergefs.recipe.keys import check_keys
from mergefs.recipe.references import ModelReference, read_reference
from mergefs.recipe.setting_reader import read_settings
from mergefs.recipe.settings import NO_SETTINGS, Settings
from mergefs.recipe.wording import listed, quote

STRUCTURE_KEYS: Final = ("models", "slices", "modules")
_MODEL_KEYS: Final = ("model", "parameters")
_SLICE_KEYS: Final = ("sources", "base_model", "parameters", "residual_weight")
_SOURCE_KEYS: Final = ("model", "layer_range", "parameters")
_MODULE_KEYS: Final = ("models", "slices", "parameters")


class StructureReader:
    """Reads the structure of one recipe, whose ``method``, ``base`` and top level ``parameters`` are known."""

    def __init__(self, method: Specification, base: ModelReference | None, parameters: Settings) -> None:
        self._method = method
        self._base = base
        self._parameters = parameters

    def read(self, document: TableItem) -> tuple[OutputModule, ...]:
        """Return the modules of the merged model; RecipeError where nothing, or several forms, say what they are."""
        present = [entry for key in STRUCTURE_KEYS if (entry := document.get(key)) is not None and not _empty(entry)]
        if not present:
            empty = next((entry for key in STRUCTURE_KEYS if (entry := document.get(key)) is not None), None)
            if empty is not None:
                raise empty.place.error(f"{empty.key!r} is empty; list at least one model, each as `- model: PATH`")
            raise document.place.error(
                "the recipe has no models; list them under 'models', each as `- model: PATH` (or ranges of their "
                "layers "
                "under 'slices')"
            )
        if len(present) > 1:
            first, second = sorted(present, key=lambda entry: entry.place.line)[:2]
            raise second.place.error(
                f"{second.key!r} stands here beside {first.key!r} in line {first.place.line}; a recipe has one of "
                f"{listed(STRUCTURE_KEYS)}, so remove the other"
            )
        entry = present[0]
        if entry.key == "modules":
            return self._modules(entry)
        return (OutputModule(None, self._slices_of(entry, (self._parameters,)), NO_SETTINGS),)

    def _modules(self, entry: Entry) -> tuple[OutputModule, ...]:
        if not isinstance(entry.value, TableItem):
            raise entry.value.place.error(
                f"'modules' must be a mapping of module names, not {describe(entry.value)}; write for example "
                "`modules: {text_decoder: {models: [...]}}`"
            )
        return tuple(self._module(module) for module in entry.value)

    def _module(self, entry: Entry) -> OutputModule:
        table = entry.value
        if not isinstance(table, TableItem):
            raise table.place.error(
                f"module {quote(entry.key)} must be a mapping, not {describe(table)}; give it 'models' or 'slices'"
            )
        check_keys(table, _MODULE_KEYS, misplaced.in_modules, "a module")
        parameters = read_settings(table.get("parameters"), self._method, None)
        present = [found for key in ("models", "slices") if (found := table.get(key)) is not None and not _empty(found)]
        if len(present) != 1:
            raise entry.place.error(
                f"module {quote(entry.key)} has {'both' if present else 'neither'} 'models' "
                f"{'and' if present else 'nor'} 'slices'; give it one of them"
            )
        return OutputModule(entry.key, self._slices_of(present[0], (parameters, self._parameters)), parameters)

    def _slices_of(self, entry: Entry, outer: tuple[Settings, ...]) -> tuple[OutputSlice, ...]:
        """Return the slices that ``models`` or ``slices`` mean; ``outer`` are the parameters around them."""
        if not isinstance(entry.value, SequenceItem):
            form = "each model as `- model: PATH`" if entry.key == "models" else "each slice as `- sources: [...]`"
            raise entry.value.place.error(f"{entry.key!r} must be a list, not {describe(entry.value)}; write {form}")
        if entry.key == "models":
            sources = self._sources(entry, entry.value, whole=True)
            if self._base is None and self._method.base is BasePolicy.REQUIRED:
                raise entry.place.error(
                    f"merge_method {self._method.name} needs a base model; add `base_model: PATH` at top level"
                )
            part = OutputSlice(tuple(source for source, _ in sources), self._base, NO_SETTINGS)
            self._check(part, entry.place, [place for _, place in sources], outer)
            return (part,)
        return tuple(self._slice(item, outer) for item in entry.value.items)

    def _slice(self, item: Item, outer: tuple[Settings, ...]) -> OutputSlice:
        if not isinstance(item, TableItem):
            raise item.place.error(f"a slice must be a mapping, not {describe(item)}; write `- sources: [...]`")
        check_keys(item, _SLICE_KEYS, misplaced.in_slices, "a slice")
        _check_residual_weight(item.get("residual_weight"))
        entry = item.get("sources")
        if entry is None or not isinstance(entry.value, SequenceItem) or not entry.value.items:
            raise item.place.error(
                "this slice has no list of sources; add `sources: [{model: PATH, layer_range: [0, 8]}]` to it"
            )
        sources = self._sources(entry, entry.value, whole=False)
        base_entry = item.get("base_model")
        base = self._base if base_entry is None else read_reference(base_entry)
        parameters = read_settings(item.get("parameters"), self._method, None)
        part = OutputSlice(tuple(source for source, _ in sources), base, parameters)
        self._check_ranges(part, [place for _, place in sources])
        if self._method.base is not BasePolicy.AS_INPUT:
            self._check_base(part, base_entry or entry)
        self._check(part, entry.place, [place for _, place in sources], (parameters, *outer))
        return part

    def _sources(self, entry: Entry, sequence: SequenceItem, whole: bool) -> list[tuple[ModelInput, Place]]:
        """Return the entries of a list of models, each with its place."""
        what, keys = ("an entry of 'models'", _MODEL_KEYS) if whole else ("a source of a slice", _SOURCE_KEYS)
        inputs: list[tuple[ModelInput, Place]] = []
        lines: dict[ModelReference, int] = {}
        for item in sequence.items:
            if not isinstance(item, TableItem):
                raise item.place.error(f"{what} must be a mapping, not {describe(item)}; write `- model: PATH`")
            check_keys(
                item,
                keys,
                misplaced.in_models if whole else misplaced.in_sources,
                "a model's entry" if whole else what,
            )
            model_entry = item.get("model")
            if model_entry is None:
                raise item.place.error(f"this entry of {entry.key!r} names no model; add `model: PATH` to it")
            model = read_reference(model_entry)
            if model in lines:
                raise model_entry.place.error(
                    f"model {quote(model.text)} is listed for the second time, first in line {lines[model]}; "
                    + (
                        "keep one entry and add up the weights"
                        if whole
                        else "one slice takes a model once, so put its other layers into a slice of their own"
                    )
                )
            lines[model] = model_entry.place.line
            parameters = read_settings(item.get("parameters"), self._method, model.text)
            layers = None if whole else _layer_range(item, model)
            inputs.append((ModelInput(model, parameters, layers), item.place))
        return inputs

    def _check_base(self, part: OutputSlice, entry: Entry) -> None:
        """Refuse a slice without its base: which layers of it are meant cannot be guessed."""
        name = self._method.name
        if part.base is None and self._method.base is BasePolicy.REQUIRED:
            raise entry.place.error(
                f"merge_method {name} needs a base model; add `base_model: PATH` to this slice or at top level"
            )
        if part.base is not None and all(source.model != part.base for source in part.sources):
            raise entry.place.error(
                f"the base model {quote(part.base.text)} is not among the sources of this slice, and merge_method "
                f"{name} "
                "needs it there; add it with its layer_range"
            )

    def _check_ranges(self, part: OutputSlice, places: list[Place]) -> None:
        """Refuse a slice whose sources have different numbers of layers."""
        lengths = [stop - start for start, stop in (source.layers or (0, 0) for source in part.sources)]
        for source, length, place in zip(part.sources, lengths, places, strict=True):
            if length != lengths[0]:
                raise place.error(
                    f"layer_range {list(source.layers or ())} of {quote(source.model.text)} has {length} layers and "
                    "the "
                    f"first source of this slice has {lengths[0]}; give all sources of a slice ranges of one length"
                )

    def _check(self, part: OutputSlice, place: Place, places: list[Place], outer: tuple[Settings, ...]) -> None:
        """Refuse, before any file is opened, a slice that the method cannot merge."""
        self._check_number(part, place)
        for parameter in self._method.parameters:
            if not parameter.required or any(parameter.name in settings for settings in (part.parameters, *outer)):
                continue
            if parameter.scope is Scope.GLOBAL:
                raise place.error(_missing(parameter, self._method, None))
            for number, entry in enumerate(part.inputs()):
                applies = parameter.scope is Scope.PER_MODEL or entry.model != part.base
                if applies and parameter.name not in entry.parameters:
                    where = places[number] if number < len(places) else place
                    if part.base is not None and entry.model != part.base and _same_directory(entry.model, part.base):
                        raise where.error(_spelled_otherwise(entry.model, part.base))
                    raise where.error(_missing(parameter, self._method, entry.model))

    def _check_number(self, part: OutputSlice, place: Place) -> None:
        method = self._method
        inputs = [entry.model for entry in part.inputs()]
        experts = [model for model in inputs if model != part.base]
        for models, how, low, high in (
            (inputs, "counted", method.min_models, method.max_models),
            (experts, "not counted", method.min_experts, method.max_experts),
        ):
            number = len(models)
            if number >= low and (high is None or number <= high):
                continue
            bound = low if number < low else high
            limit = "exactly" if low == high else "at least" if number < low else "at most"
            names = listed(model.text for model in models[:8])
            raise place.error(
                f"merge_method {method.name} takes {limit} {bound} {'model' if bound == 1 else 'models'}, the base "
                f"{how}, and this recipe has {number} ({names}{', ...' if number > 8 else ''}); "
                f"{'add' if number < low else 'remove'} models"
            )


def _empty(entry: Entry) -> bool:
    """Return whether an entry is a list or mapping without contents, as mergekit writes what is not set."""
    value = entry.value
    return (isinstance(value, SequenceItem) and not value.items) or (isinstance(value, TableItem) and not value.entries)


def _check_residual_weight(entry: Entry | None) -> None:
    """Refuse a residual weight that is no number; mergekit reads one, and uses it for nothing."""
    value = None if entry is None else entry.value
    if entry is not None and not (isinstance(value, ScalarItem) and _is_number(value.value)):
        raise entry.value.place.error(f"{entry.key!r} must be a number, not {describe(entry.value)}; remove it")


def _is_number(value: object) -> bool:
    """Return whether ``value`` is a number, or text that reads as one (YAML takes 1e-3 for text)."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layer_range(item: TableItem, model: ModelReference) -> tuple[int, int]:
    """Return the layers that a source of a slice gives."""
    entry = item.get("layer_range")
    if entry is None:
        raise item.place.error(
            f"the source {quote(model.text)} has no layer_range; add `layer_range: [0, 8]` (the first layer, and the "
            "one "
            "after the last)"
        )
    value = entry.value
    numbers = [_whole_number(element) for element in value.items] if isinstance(value, SequenceItem) else []
    if len(numbers) != 2 or any(number is None for number in numbers):
        raise entry.place.error(
            "layer_range must be two whole numbers, the first layer and the one after the last, as [0, 8]; correct it"
        )
    start, stop = (number or 0 for number in numbers)
    if not 0 <= start < stop:
        raise entry.place.error(
            f"layer_range [{start}, {stop}] holds no layers; give the first layer and the one after the last"
        )
    return start, stop


def _whole_number(item: Item) -> int | None:
    if not isinstance(item, ScalarItem):
        return None
    try:
        return to_int(item.value)
    except ValueError:
        return None


def _same_directory(model: ModelReference, base: ModelReference) -> bool:
    """Return whether two references differ in nothing but how the path is written, as `./base` and `base`."""
    first, second = (os.path.normpath(reference.path).replace("//", "/") for reference in (model, base))
    return first == second and (model.revision, model.adapter) == (base.revision, base.adapter)


def _spelled_otherwise(model: ModelReference, base: ModelReference) -> str:
    return (
        f"{quote(model.text)} is the base model written in another way, so that it counts as an expert; write "
        f"{quote(base.text)} here, too"
    )


def _missing(parameter: Parameter, method: Specification, model: ModelReference | None) -> str:
    need = f"merge_method {method.name} needs the parameter {parameter.name!r} ({parameter.meaning})"
    if model is None:
        return f"{need}; set it in the 'parameters' at top level"
    return (
        f"{need} for model {quote(model.text)}; set it in the 'parameters' of that model, or for all models in the "
        "'parameters' at top level"
    )
