"""Where a tensor stands among the layers, from its name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_LAYER: Final = re.compile(r"\.([0-9]{1,9})\.")


@dataclass(frozen=True, slots=True)
class LayerName:
    """The name of a tensor of a layer, ``stack.index.rest``: ``model.layers``, ``3``, ``mlp.up_proj.weight``."""

    stack: str
    index: int
    rest: str

    def at(self, index: int) -> str:
        """Return the name of the same tensor in another layer of the stack."""
        return f"{self.stack}.{index}.{self.rest}"


def split_layer(tensor_name: str) -> LayerName | None:
    """Return the parts of a name around its first number, or None for a tensor of no layer."""
    match = _LAYER.search(tensor_name)
    if match is None:
        return None
    return LayerName(tensor_name[: match.start()], int(match[1]), tensor_name[match.end() :])


def layer_of(tensor_name: str) -> int | None:
    """Return the number of the layer that ``tensor_name`` belongs to (its first ``.N.``), or None.

    Names such as ``vision.blocks.3.weight`` have a number too: only with the number of layers can it be told
    whether it is one of the decoder's, so see ``layer_position``.
    """
    match = _LAYER.search(tensor_name)
    return int(match[1]) if match else None


def layer_position(tensor_name: str, number_of_layers: int | None) -> float:
    """Return the position of a tensor's layer for gradients, from 0 (the first layer) to 1 (the last).

    The only layer of a model is at 1; what belongs to no layer (embedding, final norm, output head) is at 0, and
    so is everything when the number of layers is not known.
    """
    layer = layer_of(tensor_name)
    if layer is None or number_of_layers is None or layer >= number_of_layers:
        return 0.0
    return position(layer, number_of_layers)


def position(layer: int, number_of_layers: int) -> float:
    """Return the position of one of several layers, from 0 to 1; the only one is at 1."""
    return layer / (number_of_layers - 1) if number_of_layers > 1 else 1.0


def layer_stacks(tensor_names: Iterable[str], number_of_layers: int | None) -> dict[str, int]:
    """Return the stacks of layers among ``tensor_names``, each with its number of layers; the main one first.

    The main stack is the one that has as many layers as config.json says (``number_of_layers``), or else the one with
    the most tensors. Its number of layers is the one in config.json where it has at least as many: what lies beyond
    (layers for speculative decoding) is no layer of the model. Numbers with gaps are no layers: they count the steps of
    one, such as the linear maps of a projector with activations between them.
    """
    indices: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in tensor_names:
        found = split_layer(name)
        if found is not None:
            indices.setdefault(found.stack, set()).add(found.index)
            tensors[found.stack] = tensors.get(found.stack, 0) + 1
    counts = {stack: len(numbers) for stack, numbers in indices.items() if len(numbers) == max(numbers) + 1}
    order = sorted(counts, key=lambda stack: (counts[stack] != number_of_layers, -tensors[stack], stack))
    if order and number_of_layers is not None and 0 < number_of_layers < counts[order[0]]:
        counts[order[0]] = number_of_layers
    return {stack: counts[stack] for stack in order}
