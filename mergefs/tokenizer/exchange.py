"""What the process that builds tokenizers is asked, and what it answers (``VocabularyRecord``, or a refusal)."""

from typing import Final

import msgspec

REQUEST: Final = "request"
ANSWER: Final = "answer"
REFUSAL: Final = "refusal"
"""The names of the files by which the two processes exchange them."""


class SourceModel(msgspec.Struct, frozen=True, array_like=True):
    """A model: its name for messages, the directory that holds its tokenizer, and whether it has one at all."""

    name: str
    directory: str
    exists: bool


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Which vocabulary to build.

    The first ``members`` of ``models`` are merged; of the others only the rows of its tokens are wanted. ``base``
    is the index of the model whose tokenizer the others' tokens are added to with ``union``. Without it the vocabulary
    is that of ``donor``, or where that is None of the base. ``tokens`` are added where they are missing, and
    ``lookups`` are tokens whose ids in one model (its index) are wanted.
    """

    models: tuple[SourceModel, ...]
    members: int
    base: int
    union: bool
    donor: SourceModel | None
    tokens: tuple[str, ...]
    lookups: tuple[tuple[int, str], ...]


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Why no vocabulary can be built, in a sentence."""

    sentence: str
