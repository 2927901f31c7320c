"""The files that a tokenizer is made of, wherever they come from, and what identifies them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, TypeAlias

from blake3 import blake3

from mergefs.errors import SourceReadError

CONFIG: Final = "config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
ADDITIONAL_CHAT_TEMPLATES: Final = "additional_chat_templates/"
PROCESSOR_CHAT_TEMPLATE: Final = "chat_template.json"
"""Where processors used to keep their chat template; where it is, they heed no other."""

_VOCABULARIES: Final = (
    *("tokenizer.json", "tokenizer-*.json", "tokenizer.*.json", "tokenizer.model*", "tekken.json", "*.tiktoken"),
    *("tiktoken.model", "spiece.model", "sentencepiece*.model", "spm.model", "*.spm", "vocab.json", "vocab.txt"),
    *("vocab.bpe", "merges.txt", "bpe.codes", "dict.txt", "encoder.json"),
)
_SETTINGS: Final = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)

FileContent: TypeAlias = bytes | Path


@dataclass(frozen=True, slots=True, eq=False)
class ModelTokenizer:
    """What is known of one model's tokenizer: the model's name, for messages, and the files by name.

    ``files`` are those for which ``is_tokenizer_file`` holds, and config.json, which tells the size of the vocabulary.
    """

    name: str
    files: Mapping[str, FileContent]

    @property
    def exists(self) -> bool:
        """Whether there is a vocabulary among the files."""
        return any(_matches(name, _VOCABULARIES) for name in self.files)

    def digest(self) -> bytes:
        """Return a hash of names and contents; SourceReadError when a file cannot be read."""
        hasher = blake3()
        for name in sorted(self.files):
            content = read_content(self.files[name])
            hasher.update(f"{len(name)} {len(content)} {name}".encode())
            hasher.update(content)
        return hasher.digest()


def is_tokenizer_file(name: str) -> bool:
    """Return whether the file ``name`` of a model directory belongs to its tokenizer, chat templates included.

    Code is not among them: none of a model's code is ever run.
    """
    return _matches(name, _VOCABULARIES) or name in _SETTINGS or name.startswith(ADDITIONAL_CHAT_TEMPLATES)


def read_content(content: FileContent) -> bytes:
    """Return the bytes of a file; SourceReadError when it cannot be read."""
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceReadError(f"{content} cannot be read ({reason}); check that you may read it") from error


def place_files(directory: Path, files: Mapping[str, FileContent]) -> None:
    """Make ``files`` appear in ``directory``: as links where they are files already."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.symlink_to(os.path.abspath(content))  # noqa: PTH100 - resolve() would follow links that may move


def collect_files(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files below ``directory`` by their relative names, sorted."""
    paths: Iterable[Path] = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(paths)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
