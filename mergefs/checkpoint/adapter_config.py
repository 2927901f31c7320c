"""``adapter_config.json`` of a LoRA adapter: what its factors mean, and what cannot be folded into a model.

PEFT (https://github.com/huggingface/peft) defines the file. Keys that only concern training are passed over; what
would change the merged weights in a way that is not known here is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mergefs.checkpoint.files import read_json_object
from mergefs.errors import CheckpointError, UnsupportedCheckpointError

_DEFAULT_RANK: Final = 8
_DEFAULT_ALPHA: Final = 8
_FOLD: Final = "fold it into its model with PEFT's merge_and_unload() and save_pretrained(), and name the result"

# What these do to a layer is more, or something else, than adding one product of two factors to its weight.
_VARIANTS: Final = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) applies to some tokens only, so no weights stand for it",
    "arrow_config": "Arrow chooses adapters for each token, so no weights stand for it",
    "kasa_config": "KaSA cuts singular values of the base model's weights",
    "layer_replication": "layer_replication makes new layers of the base model's",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QALoRA belongs to quantised weights",
    "velora_config": "VeLoRA is not known here",
}
_INITIALISATIONS: Final = {
    "corda": "CorDA",
    "loftq": "LoftQ",
    "olora": "OLoRA",
    "pissa": "PiSSA",
}
_PASSED_OVER: Final = frozenset(
    {
        *("auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size"),
        *("revision", "runtime_config", "target_modules", "task_type", "base_model_name_or_path"),
        # Written by the first versions of PEFT, which merged as later ones do.
        *("enable_lora", "merge_weights"),
    }
)
_READ: Final = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias"),
        *("init_lora_weights", "target_parameters", "trainable_token_indices"),
    }
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What ``adapter_config.json`` says about the merged weights.

    ``base_model`` is the path or Hub name of the model that the adapter was trained on, at ``base_revision``.
    ``rank_pattern`` and ``alpha_pattern`` are regular expressions for names of modules with their values, in order.
    ``minor`` says that the factors are those of MiCA. ``trainable_tokens`` are the indices of the tokens whose rows
    the adapter replaces, by the name of the module, which is empty where the file does not name it.
    """

    path: Path
    base_model: str | None
    base_revision: str | None
    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    fan_in_fan_out: bool
    weight_decomposed: bool
    minor: bool
    modules_to_save: tuple[str, ...]
    keeps_ties: bool
    target_parameters: tuple[str, ...]
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...]

    def rank_of(self, module: str) -> int:
        """Return the rank of the factors of ``module``."""
        return next((rank for pattern, rank in self.rank_pattern if _matches(pattern, module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return what the product of the factors of ``module`` is multiplied by."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if _matches(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def is_saved(self, module: str) -> bool:
        """Return whether ``modules_to_save`` names ``module``."""
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Return which rows of the embedding ``module`` the adapter replaces, or None where the file does not say."""
        return next(
            (indices for name, indices in self.trainable_tokens if not name or f".{module}".endswith(f".{name}")), None
        )


def read_adapter_config(path: Path) -> AdapterConfig:
    """Return the content of the file ``path``.

    Raises CheckpointError for values that make no sense, UnsupportedCheckpointError for adapters that are no LoRA
    and for variants that do more than add a product of factors, SourceReadError when the file cannot be read.
    """
    document = read_json_object(path)
    _refuse_other_types(path, document)
    _refuse_variants(path, document)
    reader = _Reader(path, document)
    return AdapterConfig(
        path=path,
        base_model=reader.text("base_model_name_or_path"),
        base_revision=reader.text("revision"),
        rank=reader.rank("r", document.get("r", _DEFAULT_RANK)),
        alpha=reader.number("lora_alpha", document.get("lora_alpha", _DEFAULT_ALPHA)),
        rank_stabilized=reader.flag("use_rslora"),
        rank_pattern=tuple((key, reader.rank("rank_pattern", value)) for key, value in reader.pattern("rank_pattern")),
        alpha_pattern=tuple(
            (key, reader.number("alpha_pattern", value)) for key, value in reader.pattern("alpha_pattern")
        ),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        weight_decomposed=reader.flag("use_dora"),
        minor=document.get("init_lora_weights") == "mica",
        modules_to_save=reader.names("modules_to_save"),
        keeps_ties=reader.flag("ensure_weight_tying"),
        target_parameters=reader.names("target_parameters"),
        trainable_tokens=reader.tokens("trainable_token_indices"),
    )


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern of PEFT names ``module``: as a whole, or from a dot to the end."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _refuse_other_types(path: Path, document: Mapping[str, Any]) -> None:
    kind = document.get("peft_type")
    if kind is None:
        raise CheckpointError(f"{path} has no peft_type; give the directory of an adapter that PEFT has saved")
    if kind != "LORA":
        raise UnsupportedCheckpointError(
            f"{path} describes an adapter of type {kind}, and only LoRA can be applied to a model here; {_FOLD}"
        )


def _refuse_variants(path: Path, document: Mapping[str, Any]) -> None:
    for key, reason in _VARIANTS.items():
        if document.get(key):
            raise UnsupportedCheckpointError(f"{path} sets {key!r}, and {reason}; {_FOLD}")
    start = document.get("init_lora_weights")
    name = next((n for key, n in _INITIALISATIONS.items() if isinstance(start, str) and start.startswith(key)), None)
    if name is not None:
        raise UnsupportedCheckpointError(
            f"{path} says that the factors were initialised by {name} (init_lora_weights: {start!r}), which also "
            "changed the weights that they are added to; save the adapter with "
            f"path_initial_model_for_weight_conversion of PEFT's save_pretrained(), or {_FOLD}"
        )
    for key, value in document.items():
        if key not in _PASSED_OVER and key not in _READ and (value is True or (isinstance(value, dict) and value)):
            raise UnsupportedCheckpointError(
                f"{path} sets {key!r}, which is not known here and may change the merged weights; {_FOLD}, or remove "
                "the key if it only concerns training"
            )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes values out of the document, with the right type or an error that names the key."""

    path: Path
    document: Mapping[str, Any]

    def _wrong(self, key: str, wanted: str, value: object) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return CheckpointError(f"{self.path}: {key!r} must be {wanted}, not {shown}; save the adapter again with PEFT")

    def text(self, key: str) -> str | None:
        value = self.document.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value or None

    def flag(self, key: str) -> bool:
        value = self.document.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return bool(value)

    def rank(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number of at least 1", value)
        return value

    def number(self, key: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return value

    def pattern(self, key: str) -> tuple[tuple[str, Any], ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise self._wrong(key, "an object from names of modules to numbers", value)
        for pattern in value:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise self._wrong(key, f"an object from regular expressions ({error})", pattern) from None
        return tuple(value.items())

    def names(self, key: str) -> tuple[str, ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, "a list of names", value)
        return tuple(value)

    def tokens(self, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        lists = value if isinstance(value, dict) else {"": value}
        for indices in lists.values():
            sound = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
            if not sound or len(set(indices)) < len(indices):
                raise self._wrong(key, "a list of different token numbers, or such lists by module", indices)
        return tuple((name, tuple(indices)) for name, indices in lists.items())
