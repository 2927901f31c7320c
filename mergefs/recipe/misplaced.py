"""Where keys belong that stand where they have no effect: mergekit passes over them without a word."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mergefs.methods.registry import METHODS

_OF_THE_WHOLE: Final = dict.fromkeys(
    (*("merge_method", "base_model", "dtype", "out_dtype"), *("tokenizer", "tokenizer_source"), "chat_template"),
    "it belongs to the whole recipe; move it to the top level",
)
_PARAMETERS: Final = {
    parameter.name: f"parameters stand in a table of their own; write `parameters: {{{parameter.name}: ...}}`"
    for method in METHODS.values()
    for parameter in method.specification.parameters
}
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

IN_RECIPES: Final[Mapping[str, str]] = MappingProxyType({**_PARAMETERS, **_MIXTURE, **_TOKENIZER, **_SEED})
IN_PARAMETERS: Final[Mapping[str, str]] = MappingProxyType(_OF_THE_WHOLE)
IN_MODULES: Final[Mapping[str, str]] = MappingProxyType({**_PARAMETERS, **_OF_THE_WHOLE})
IN_SLICES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **IN_MODULES,
        **dict.fromkeys(
            ("model", "layer_range"),
            "the models of a slice stand in its list of sources, as `- sources: [{model: PATH, layer_range: [0, 8]}]`",
        ),
    }
)
IN_SOURCES: Final[Mapping[str, str]] = MappingProxyType({**IN_MODULES, **_REFERENCE})
IN_MODELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **IN_SOURCES,
        "layer_range": (
            "an entry of 'models' is a whole model; ranges of layers stand under 'slices', as "
            "`slices: [{sources: [{model: PATH, layer_range: [0, 8]}]}]`"
        ),
    }
)
