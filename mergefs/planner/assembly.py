"""Which tensors the merged model has, which slice of the recipe each belongs to, and its name in every input."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mergefs.errors import RecipeError
from mergefs.planner.modules import DEFAULT, module_names, module_of
from mergefs.planner.plan import InputModel
from mergefs.recipe.definition import ModelInput, OutputModule, OutputSlice, Recipe
from mergefs.recipe.layers import layer_stacks, position, split_layer
from mergefs.recipe.references import ModelReference
from mergefs.recipe.wording import listed, quote

_BEFORE_LAYERS: Final = re.compile(
    r"(^|[._])(?!embed_out)(wte|wpe|emb|embd|embed|embeddings?|embed_tokens|embed_in|embed_positions|word_embeddings|tok_embeddings|"
    r"shared|conv1|conv2|patch\w*|class_embedding|pos_embed|rotary\w*|relative_pe|ln_pre|layernorm_pre)([._]|$)"
)

Models = Mapping[ModelReference, InputModel]


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the merged model that have the same inputs: all of them, or those of one layer.

    ``names`` gives for each of the slice's ``inputs()`` the tensors that it has to give, by the name that they get in
    the merged model. ``reference`` is the input that decides which tensors there are.
    """

    module: OutputModule
    part: OutputSlice
    names: tuple[Mapping[str, str], ...]
    reference: int
    position: Callable[[str], float]


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the merged model comes from: a model, and the number of the layer there."""

    model: InputModel
    layer: int


@dataclass(frozen=True, slots=True)
class Assembly:
    """The groups of a recipe, and for each module that is put together from slices where its layers come from."""

    groups: tuple[Group, ...]
    layers: Mapping[str | None, tuple[LayerOrigin, ...]]
    unlisted: tuple[str, ...]
    """Tensors of the donor in no module that the recipe names."""


def assemble(recipe: Recipe, models: Models, donor: InputModel) -> Assembly:
    """Return what the merged model is put together from.

    Raises RecipeError for modules and ranges of layers that the models do not have.
    """
    groups: list[Group] = []
    layers: dict[str | None, tuple[LayerOrigin, ...]] = {}
    members = _members(recipe, donor)
    for module in recipe.modules:
        member = members[module.name]
        if all(part.whole for part in module.slices):
            groups += [_whole(module, part, models, donor, member) for part in module.slices]
        else:
            stacked = _Stack(recipe, module, models, member)
            groups += stacked.groups()
            layers[module.name] = stacked.origins()
    unlisted = [name for name in donor.tensors if not any(member(name) for member in members.values())]
    return Assembly(tuple(groups), layers, tuple(unlisted))


def _members(recipe: Recipe, donor: InputModel) -> dict[str | None, Callable[[str], bool]]:
    """Return for each module of the recipe which tensors belong to it."""
    members: dict[str | None, Callable[[str], bool]] = {}
    for module in recipe.modules:
        if module.name is None:
            members[None] = lambda name: True
        elif module.name != DEFAULT:
            found = module_of(module.name, donor.tensors)
            if found is None:
                raise RecipeError(
                    f"{recipe.origin}: {donor.title} has no module {quote(module.name)}; its modules are "
                    f"{listed(module_names(donor.tensors))}, and the beginning of tensor names up to a dot is one, too"
                )
            members[module.name] = found
    if any(module.name == DEFAULT for module in recipe.modules):
        others = tuple(members.values())
        members[DEFAULT] = lambda name: not any(member(name) for member in others)
    return members


def _reference(part: OutputSlice) -> int:
    """Return the input that decides which tensors a slice has: its base, or without one the first."""
    return next((index for index, entry in enumerate(part.inputs()) if entry.model == part.base), 0)


def _whole(
    module: OutputModule, part: OutputSlice, models: Models, donor: InputModel, member: Callable[[str], bool]
) -> Group:
    """Return all tensors of a module of whole models."""
    inputs = [models[entry.model] for entry in part.inputs()]
    stacks = layer_stacks(donor.tensors, donor.number_of_layers)

    def layer_position(name: str) -> float:
        found = split_layer(name)
        if found is None:
            return 0.0
        if found.stack not in stacks:
            return 1.0  # a step of the only layer there is
        return position(found.index, stacks[found.stack]) if found.index < stacks[found.stack] else 0.0

    names = tuple({name: name for name in model.tensors if member(name)} for model in inputs)
    return Group(module, part, names, _reference(part), layer_position)


class _Stack:
    """A module whose layers are put together from ranges of layers."""

    def __init__(self, recipe: Recipe, module: OutputModule, models: Models, member: Callable[[str], bool]) -> None:
        self._recipe = recipe
        self._module = module
        self._models = models
        self._member = member
        self._layers: dict[ModelReference, dict[int, list[str]]] = {}
        self._stacks = {entry.model: self._stack_of(entry.model) for entry in self._entries()}
        self._check_ranges()

    def groups(self) -> Iterator[Group]:
        """Yield the tensors before the layers, those of each layer, and those after the layers."""
        first, last = self._module.slices[0], self._module.slices[-1]
        yield self._loose(first, before=True)
        number = 0
        for part in self._module.slices:
            count = _length(part)
            for offset in range(count):
                yield self._layer(part, offset, number, position(offset, count))
                number += 1
        yield self._loose(last, before=False)

    def origins(self) -> tuple[LayerOrigin, ...]:
        """Return where each layer comes from."""
        found: list[LayerOrigin] = []
        for part in self._module.slices:
            entry = part.inputs()[_reference(part)]
            start, stop = entry.layers or (0, 0)
            found += [LayerOrigin(self._models[entry.model], layer) for layer in range(start, stop)]
        return tuple(found)

    def _entries(self) -> Iterator[ModelInput]:
        for part in self._module.slices:
            yield from part.inputs()

    def _stack_of(self, reference: ModelReference) -> tuple[str, int]:
        """Return the stack of layers of a model that slices are cut from, and its number of layers."""
        model = self._models[reference]
        names = [name for name in model.tensors if self._member(name)]
        stacks = layer_stacks(names, model.number_of_layers)
        if not stacks:
            raise RecipeError(
                f"{self._recipe.origin}: {model.title} has no layers that slices could be cut from (no tensor name "
                "with "
                "a number between dots); list it under 'models'"
            )
        exact = [stack for stack, count in stacks.items() if count == model.number_of_layers]
        if len(stacks) > 1 and len(exact) != 1:
            raise RecipeError(
                f"{self._recipe.origin}: {model.title} has several stacks of layers ({listed(stacks)}), so it is not "
                "clear "
                "which one the slices are cut from; put the slices of each under 'modules'"
            )
        return next(iter(stacks.items()))

    def _check_ranges(self) -> None:
        for entry in self._entries():
            count = self._stacks[entry.model][1]
            if entry.layers is not None and entry.layers[1] > count:
                raise RecipeError(
                    f"{self._recipe.origin}: layer_range {list(entry.layers)} of {quote(entry.model.text)} goes "
                    "beyond its "
                    f"{count} layers; end it at {count} or before"
                )

    def _layer(self, part: OutputSlice, offset: int, number: int, t: float) -> Group:
        """Return the tensors of layer ``number`` of the merged model, the layer ``offset`` of a slice."""
        inputs = part.inputs()
        reference = _reference(part)
        stack = self._stacks[inputs[reference].model][0]
        names: list[dict[str, str]] = []
        for entry in inputs:
            start, _ = entry.layers or (0, 0)
            own, found = self._stacks[entry.model][0], self._by_layer(entry.model)
            layer = start + offset
            names.append({f"{stack}.{number}.{rest}": f"{own}.{layer}.{rest}" for rest in found.get(layer, ())})
        return Group(self._module, part, tuple(names), reference, lambda name: t)

    def _loose(self, part: OutputSlice, before: bool) -> Group:
        """Return the tensors of no layer that belong to the first slice (those before the layers), or to the last."""
        names: list[dict[str, str]] = []
        for entry in part.inputs():
            stack, _ = self._stacks[entry.model]
            loose = [
                name
                for name in self._models[entry.model].tensors
                if self._member(name) and ((parts := split_layer(name)) is None or parts.stack != stack)
            ]
            names.append({name: name for name in loose if (_BEFORE_LAYERS.search(name) is not None) == before})
        return Group(self._module, part, tuple(names), _reference(part), lambda name: 0.0)

    def _by_layer(self, reference: ModelReference) -> Mapping[int, Sequence[str]]:
        """Return the ends of the names of each layer's tensors."""
        found = self._layers.get(reference)
        if found is None:
            stack, _ = self._stacks[reference]
            found = self._layers[reference] = {}
            for name in self._models[reference].tensors:
                parts = split_layer(name)
                if parts is not None and parts.stack == stack and self._member(name):
                    found.setdefault(parts.index, []).append(parts.rest)
        return found


def _length(part: OutputSlice) -> int:
    """Return the number of layers of a slice."""
    start, stop = part.sources[0].layers or (0, 0)
    return stop - start
