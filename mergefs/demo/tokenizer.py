"""A byte-level tokenizer that ``transformers.AutoTokenizer`` loads from a model directory, without a network.

Its first 256 ids are the values of the bytes, so that text becomes ids by ``list(text.encode())``; three special
tokens follow. It has no merges, adds no special token by itself, and gives back any text that it encoded.
"""

import json
from pathlib import Path
from typing import Any, Final

from mergefs.evaluation.imports import missing_dependency

BYTES: Final = 256
BOS_ID: Final = 256
EOS_ID: Final = 257
PAD_ID: Final = 258
VOCABULARY_SIZE: Final = 259

_SPECIAL_TOKENS: Final = {
    "bos_token": ("<|begin_of_text|>", BOS_ID),
    "eos_token": ("<|end_of_text|>", EOS_ID),
    "pad_token": ("<|padding|>", PAD_ID),
}


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into ``directory``, which exists.

    Raises MissingDependencyError when the tokenizers library is not installed.
    """
    (directory / "tokenizer.json").write_text(build_tokenizer().to_str(pretty=True), encoding="utf-8")
    special = {role: token for role, (token, _) in _SPECIAL_TOKENS.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", special)


def build_tokenizer() -> Any:
    """Return the ``tokenizers.Tokenizer``; raises MissingDependencyError when that library is not installed."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise missing_dependency("tokenizers") from error

    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())}
    vocabulary |= dict(_SPECIAL_TOKENS.values())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, _ in _SPECIAL_TOKENS.values()])
    return tokenizer


def _characters_of_bytes() -> list[str]:
    """Return for each byte value the printable character by which byte-level tokenizers write it.

    The printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters: list[str] = []
    substitutes = 0
    for byte in range(BYTES):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + substitutes))
            substitutes += 1
    return characters


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
