"""Where keys belong that stand where they have no effect: mergekit passes over them without a word.

For each key there is why it cannot be used, and where it belongs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mergefs.methods.registry import METHODS

_OF_THE_WHOLE: Final = dict.fromkeys(
    (*("merge_method", "base_model", "dtype", "out_dtype"), *("tokenizer", "tokenizer_source"), "chat_template"),
    "it belongs to the whole recipe; move it to the top level",
)
_REFERENCE: Final = {
    "lora": "an adapter is a part of the model's reference; write `model: PATH+ADAPTER`",
    "revision": "a revision is a part of the model's reference; write `model: PATH@REVISION`",
}
_MIXTURE: Final = dict.fromkeys(
    ("experts", "shared_experts", "gate_mode", "experts_per_token"),
    "mixtures of experts are built by mergekit-moe; the model that it writes can be merged here",
)
_TOKENIZER: Final = {
    key: f"it belongs to the tokenizer; write it as `tokenizer: {{source: union, {key}: ...}}`"
    for key in ("tokens", "pad_to_multiple_of")
}
_SEED: Final = {"random_seed": "the seed is not part of a recipe; give it on the command line, as --random-seed"}

IN_PARAMETERS: Final[Mapping[str, str]] = MappingProxyType(_OF_THE_WHOLE)


def in_recipes() -> Mapping[str, str]:
    """Return keys at the top level of a recipe."""
    return {**_parameters(), **_MIXTURE, **_TOKENIZER, **_SEED}


def in_modules() -> Mapping[str, str]:
    """Return keys of a module."""
    return {**_parameters(), **_OF_THE_WHOLE}


def in_slices() -> Mapping[str, str]:
    """Return keys of a slice."""
    source = "the models of a slice stand in its list of sources, as `- sources: [{model: PATH, layer_range: [0, 8]}]`"
    return {**in_modules(), **dict.fromkeys(("model", "layer_range"), source)}


def in_sources() -> Mapping[str, str]:
    """Return keys of a source of a slice."""
    return {**in_modules(), **_REFERENCE}


def in_models() -> Mapping[str, str]:
    """Return keys of an entry of ``models``."""
    whole = (
        "an entry of 'models' is a whole model; ranges of layers stand under 'slices', as "
        "`slices: [{sources: [{model: PATH, layer_range: [0, 8]}]}]`"
    )
    return {**in_sources(), "layer_range": whole}


def _parameters() -> dict[str, str]:
    """Return the parameters of all methods, which are imported for it: only once a key is not known."""
    return {
        parameter.name: f"parameters stand in a table of their own; write `parameters: {{{parameter.name}: ...}}`"
        for method in METHODS.values()
        for parameter in method.specification.parameters
    }
