"""How the modules that an adapter names are called in the files of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mergefs.checkpoint.adapter import Adapter
from mergefs.errors import CheckpointError, UnsupportedCheckpointError

Spelling = Callable[[str], str]
"""From a name of the adapter to that in the files of the model."""

OUTPUT_EMBEDDINGS: Final = ("lm_head.weight", "embed_out.weight")
_INPUT_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class Outline:
    """What of a model decides where an adapter belongs: the shapes of its tensors, by name, and its config.json.

    ``name`` is what messages call it.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    ties_embeddings: bool

    @property
    def model_type(self) -> str:
        """The architecture, of the text model where there are several."""
        text = self.config.get("text_config")
        found = text.get("model_type") if isinstance(text, Mapping) else None
        return str(found or self.config.get("model_type") or "")

    @property
    def input_embedding(self) -> str | None:
        """The tensor that output embeddings are tied to."""
        return next((name for name in self.shapes if name.endswith(_INPUT_EMBEDDINGS)), None)


def find_spelling(adapter: Adapter, model: Outline) -> Spelling:
    """Return how the names of the adapter's modules are spelled in the files of ``model``, the same way for all.

    An adapter is named after the modules of a loaded model. Files may lack the name of the model inside of the model
    with a head (GPT-2), and those with images call their parts otherwise than transformers does since version 4.52.
    """
    wanted = _wanted_tensors(adapter)
    best: tuple[int, Sequence[str]] | None = None
    for spelling in _SPELLINGS:
        missing = [name for name, choices in wanted if not any(find_tensor(spelling(c), model) for c in choices)]
        if not missing:
            return spelling
        if best is None or len(missing) < best[0]:
            best = (len(missing), missing)
    count, names = best or (0, [])
    if any(name.startswith(f"{spelling(names[0])}.0.") for spelling in _SPELLINGS for name in model.shapes):
        raise UnsupportedCheckpointError(
            f"{adapter.path} changes the experts of module {names[0]!r} as one tensor, but {model.name} holds each of "
            "them apart, where the factors lie scattered; fold the adapter into its model with PEFT's "
            "merge_and_unload() and save_pretrained(), and name the result"
        )
    if count == len(wanted):
        raise CheckpointError(
            f"{adapter.path} fits no tensor of {model.name}: it changes module {names[0]!r}, for one, and the model "
            "has no weights of that name; apply it to the model that it was trained on"
        )
    raise CheckpointError(
        f"{adapter.path} fits {model.name} only in part: the model has no weights for module {names[0]!r}"
        f"{f' and {count - 1} more' if count > 1 else ''}; apply the adapter to the model that it was trained on"
    )


def _wanted_tensors(adapter: Adapter) -> list[tuple[str, tuple[str, ...]]]:
    """Return, for everything that the adapter holds, a name for messages and the tensors that it may stand for."""
    parameters = [name.rpartition(".")[2] for name in adapter.config.target_parameters]
    wanted = [
        (f.module, (f"{f.module}.weight", *(f"{f.module}.{parameter}" for parameter in parameters)))
        for f in adapter.factors
    ]
    wanted += [(name, (name,)) for name in adapter.saved]
    wanted += [(module, (f"{module}.weight",)) for module in adapter.tokens]
    return wanted


def find_tensor(name: str, model: Outline) -> str | None:
    """Return the tensor ``name`` of the model, or what it is tied to."""
    if name in model.shapes:
        return name
    if model.ties_embeddings and name.endswith(OUTPUT_EMBEDDINGS):
        return model.input_embedding
    return None


def _renamed(*prefixes: tuple[str, str]) -> Spelling:
    """Return the spelling that replaces the first of ``prefixes`` that a name has."""

    def spell(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)

    return spell


_SPELLINGS: Final[tuple[Spelling, ...]] = (
    lambda name: name,
    _renamed(*((f"{prefix}.", "") for prefix in ("transformer", "model", "gpt_neox"))),
    _renamed(
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    _renamed(("model.language_model.", "model."), ("model.visual.", "visual.")),
    _renamed(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    _renamed(("visual.", "model.visual."), ("model.", "model.language_model.")),
    _renamed(("lm_head.", "embed_out.")),  # GPT-NeoX
    lambda name: name.replace(".mlp.", ".block_sparse_moe."),  # Mixtral
)
