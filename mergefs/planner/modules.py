"""The modules of a model: which tensors a name under ``modules`` of a recipe means."""

import re
from collections.abc import Callable, Iterable
from typing import Final

from mergefs.recipe.layers import layer_stacks

# As mergekit calls the parts of the architectures that it knows to have several.
_KNOWN: Final[dict[str, re.Pattern[str]]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "multi_modal_projector": r"(model\.)?(multi_modal_projector\.|visual\.(merger|deepstack_merger_list)\.)",
        "vision_tower": r"(model\.)?(vision_tower\.|visual\.(?!merger\.|deepstack_merger_list\.))",
        "vision_model": r"(model\.)?vision_model\.",
        "text_decoder": r"((model\.)?language_model\.|model\.(layers|embed_tokens|norm)\.|lm_head\.)",
        "encoder": r"(model\.)?encoder\.",
        "decoder": r"(model\.)?decoder\.",
        "shared": r"(shared|lm_head)\.",
    }.items()
}
DEFAULT: Final = "default"
"""What is in no other module that a recipe names."""


def module_of(name: str, tensor_names: Iterable[str]) -> Callable[[str], bool] | None:
    """Return whether a tensor belongs to module ``name`` of a model, or None where the model has no such module.

    A module is one of those that mergekit's architectures have, or the common beginning of tensor names up to a dot.
    """
    prefix = f"{name}."
    known = _KNOWN.get(name)
    names = tuple(tensor_names)
    if any(tensor.startswith(prefix) for tensor in names) and (known is None or not any(map(known.match, names))):
        return lambda tensor: tensor.startswith(prefix)
    if known is not None and any(map(known.match, names)):
        return lambda tensor: known.match(tensor) is not None
    return None


def module_names(tensor_names: Iterable[str]) -> tuple[str, ...]:
    """Return names that a recipe may use for parts of a model with these tensors."""
    names = tuple(tensor_names)
    known = [name for name, pattern in _KNOWN.items() if any(map(pattern.match, names))]
    if not any(name.startswith("shared.") for name in names):
        known = [name for name in known if name != "shared"]  # an output head alone is a part of the decoder
    return (*known, *layer_stacks(names, None), DEFAULT)
