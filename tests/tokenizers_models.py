"""Tiny tokenizers of every kind, and model directories that have them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import llama_config, llama_tensors, write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
TEXTS = {
    "fox": ["the quick brown fox jumps over the lazy dog", "a lazy dog sleeps, and the fox jumps again"],
    "code": ["def main(args): return args[0] + args[1]", "while args: main(args); return the fox"],
    "math": ["let x be the sum of all y, then x + y is even", "the lazy proof: jumps from x to y"],
}


def word_level(words: Sequence[str], special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Return a tokenizer that knows ``words``, after the special tokens."""
    known = list(dict.fromkeys([*special, *words]))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def trained(kind: str, topic: str, size: int = 60) -> Tokenizer:
    """Return a tokenizer of ``kind`` (WordLevel, BPE or Unigram) with at most ``size`` tokens of a topic."""
    trainer: Any
    if kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(SPECIAL))
    elif kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL))
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=list(SPECIAL), unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS[topic], trainer)
    return tokenizer


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, added: Sequence[AddedToken | str] = (), **settings: Any
) -> int:
    """Write the files of a tokenizer as transformers does, and return the number of its tokens."""
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 64} | settings
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    whole.add_tokens(list(added))
    whole.save_pretrained(directory)
    return len(whole.get_vocab())


def write_config(directory: Path, vocabulary: int) -> Path:
    """Write the config.json of a Llama model without weights, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(llama_config(torch.float32, vocabulary=vocabulary)))
    return directory


def write_tokenizer_model(
    directory: Path,
    tokenizer: Tokenizer,
    added: Sequence[AddedToken | str] = (),
    rows: int | None = None,
    **settings: Any,
) -> Path:
    """Write a directory with a tokenizer and a config.json that tells of ``rows`` rows, as many as tokens if None."""
    tokens = write_tokenizer(directory, tokenizer, added, **settings)
    return write_config(directory, tokens if rows is None else rows)


def write_whole_model(
    directory: Path,
    tokenizer: Tokenizer,
    added: Sequence[AddedToken | str] = (),
    rows: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    hidden: int = 32,
    **settings: Any,
) -> Path:
    """Write a whole Llama model with a tokenizer; its embeddings have ``rows`` rows, as many as tokens if None."""
    tokens = write_tokenizer(directory, tokenizer, added, **settings)
    shape: dict[str, Any] = {
        "hidden": hidden,
        "layers": 1,
        "vocabulary": tokens if rows is None else rows,
        "tied": tied,
    }
    tensors, config = llama_tensors(seed, dtype, **shape), llama_config(dtype, **shape)
    return write_model(directory, tensors, config, tokenizer_files=False)
