"""What config.json says of a model, wherever the architecture keeps it."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

_LAYER_COUNT_KEYS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_OUTPUT_EMBEDDINGS: Final = ("lm_head.weight", "embed_out.weight", "output.weight")


def number_of_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers (of the text model, where there are several), or None when it is not said."""
    for section in _sections(config):
        for key in _LAYER_COUNT_KEYS:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
    return None


def ties_embeddings(config: Mapping[str, Any], tensor_names: Iterable[str]) -> bool:
    """Return whether the output embedding is the input embedding.

    ``tie_word_embeddings`` of config.json says so; transformers leaves the key out for architectures that tie
    by default, and then the absence of an output embedding among the tensors tells.
    """
    for section in _sections(config):
        value = section.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return not any(name.endswith(_OUTPUT_EMBEDDINGS) for name in tensor_names)


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]
