"""config.json of the merged model: the donor's, with the dtype of the recipe and the layers that it puts together."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mergefs.planner.assembly import LayerOrigin
from mergefs.planner.plan import InputModel
from mergefs.recipe.definition import Recipe

# Where architectures keep the number of layers of a module: the section of config.json (None: the top level), the key.
_COUNTS: Final[dict[str | None, tuple[tuple[str | None, str], ...]]] = {
    "encoder": ((None, "encoder_layers"), (None, "num_layers"), (None, "num_hidden_layers")),
    "decoder": ((None, "decoder_layers"), (None, "num_decoder_layers")),
    "vision_tower": (("vision_config", "num_hidden_layers"), ("vision_config", "depth")),
    "vision_model": (("vision_config", "num_hidden_layers"), ("vision_config", "depth")),
}
_COUNTS_OF_TEXT: Final = tuple(
    (section, key)
    for section in ("text_config", None)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
)
# Lists with an entry for each layer come under many names, and lists of layers' numbers under few.
_LISTS_OF_NUMBERS: Final = frozenset(
    {"mlp_only_layers", "cross_attention_layers", "moe_layers", "moe_layer_indices", "attn_layer_indices"}
    | {"full_attn_idxs", "global_attn_layers"}
)
_NO_LISTS_OF_LAYERS: Final = ("token_id", "architectures", "labels", "keys_to_ignore", "mrope_section")
_VOCABULARY_SIZE: Final = "vocab_size"
_COUNTED: Final = ("max_window_layers", "num_mamba_layers")
"""Numbers that mean all layers where they equal the number of layers."""


def merged_config(
    donor: InputModel,
    recipe: Recipe,
    layers: Mapping[str | None, Sequence[LayerOrigin]],
    vocabulary_size: int | None = None,
) -> Mapping[str, Any] | None:
    """Return the content of the merged model's config.json, or None where the donor's file can stay as it is.

    ``layers`` says for each module that is put together from ranges of layers where its layers come from.
    ``vocabulary_size`` is the number of rows of the embeddings where that is not the donor's.
    """
    config = _with_dtype(donor.config, recipe)
    for module, origins in layers.items():
        config = _with_layers(config, module, origins)
    if vocabulary_size is not None:
        config = _with_vocabulary_size(config, vocabulary_size)
    return None if config == donor.config else config


def _with_dtype(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return a config with the dtype that the recipe gives."""
    dtype = recipe.out_dtype or recipe.dtype
    changed = dict(config)
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        changed.update(dict.fromkeys(keys, dtype.torch_name))
    return changed


def _with_vocabulary_size(config: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a config with the number of rows that the embeddings have, wherever it says that."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and (_VOCABULARY_SIZE in text or _VOCABULARY_SIZE not in config):
        config = {**config, "text_config": {**text, _VOCABULARY_SIZE: size}}
    if _VOCABULARY_SIZE in config or not isinstance(text, Mapping):
        config = {**config, _VOCABULARY_SIZE: size}
    return config


def _with_layers(config: dict[str, Any], module: str | None, origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """Return a config with the number of layers of a module, and what it says of each layer, for ``origins``."""
    found = next(
        ((section, key) for section, key in _COUNTS.get(module, _COUNTS_OF_TEXT) if key in _section(config, section)),
        None,
    )
    if found is None:
        return config
    section, key = found
    adapted = {name: _adapted(name, value, section, key, origins) for name, value in _section(config, section).items()}
    adapted[key] = len(origins)
    return adapted if section is None else {**config, section: adapted}


def _section(config: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """Return a section of a config, empty where there is none; None is the top level."""
    section = config if name is None else config.get(name)
    return section if isinstance(section, Mapping) else {}


def _adapted(name: str, value: Any, section: str | None, count_key: str, origins: Sequence[LayerOrigin]) -> Any:
    """Return a value of the config for the layers that ``origins`` name."""

    def original(origin: LayerOrigin, what: str) -> Any:
        return _section(origin.model.config, section).get(what)

    counts = {original(origin, count_key) for origin in origins}
    if name in _COUNTED and value in counts:
        return len(origins)
    if not isinstance(value, list):
        return value
    if name in _LISTS_OF_NUMBERS:
        return [
            number
            for number, origin in enumerate(origins)
            if origin.layer in (value if (own := original(origin, name)) is None else own)
        ]
    if len(value) not in counts or any(part in name for part in _NO_LISTS_OF_LAYERS):
        return value
    lists = [own if isinstance(own := original(origin, name), list) else value for origin in origins]
    if any(origin.layer >= len(entries) for origin, entries in zip(origins, lists, strict=True)):
        return value
    return [entries[origin.layer] for origin, entries in zip(origins, lists, strict=True)]


def encode_config(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of a config.json."""
    return (json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n").encode()
