"""Where a tensor stands among the layers, from its name."""

import re
from typing import Final

_LAYER: Final = re.compile(r"\.([0-9]{1,9})\.")


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
    return layer / (number_of_layers - 1) if number_of_layers > 1 else 1.0
