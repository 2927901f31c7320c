"""Gets the merged vocabulary of a recipe: from the catalog, or from a process that builds it with transformers."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import VocabularyRecord
from mergefs.errors import CheckpointError, MergefsError, MissingDependencyError
from mergefs.progress import Progress
from mergefs.recipe.references import ModelReference
from mergefs.recipe.tokenizer import OtherTokenSource, TokenizerSettings
from mergefs.recipe.wording import quote
from mergefs.tokenizer.exchange import ANSWER, REFUSAL, REQUEST, Refusal, Request, SourceModel
from mergefs.tokenizer.files import ModelTokenizer, place_files
from mergefs.tokenizer.vocabulary import MergedVocabulary, NamedToken

_FORMAT: Final = 1
"""Raised whenever the same tokenizers would be merged into something else than before."""

_LIBRARIES: Final = ("transformers", "tokenizers", "sentencepiece", "tiktoken")
"""What is built may depend on the versions of these."""


@dataclass(frozen=True, slots=True)
class TokenizerModels:
    """The tokenizers that take part: of every model of the merge, in the recipe's order.

    ``base`` is the base of the recipe, or without one its first model. ``donor`` is the model that the settings take
    the vocabulary from, where they name one; it may take no part in the merge. ``others`` take no part, and yet their
    rows are wanted.
    """

    merged: Mapping[ModelReference, ModelTokenizer]
    base: ModelReference
    donor: ModelTokenizer | None
    others: Mapping[ModelReference, ModelTokenizer] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """The models whose rows are wanted, those that take part first."""
        return (*self.merged, *self.others)

    def all(self) -> tuple[ModelTokenizer, ...]:
        """Return every tokenizer: those of ``references`` and the donor's."""
        donor = [] if self.donor is None else [self.donor]
        return (*self.merged.values(), *self.others.values(), *donor)


def merged_vocabulary(
    settings: TokenizerSettings, models: TokenizerModels, catalog: Catalog, progress: Progress
) -> MergedVocabulary:
    """Return the vocabulary that ``settings`` make of the tokenizers of ``models``.

    It is built once for the same files, settings and versions of libraries, and kept in ``catalog`` after that.

    Raises CheckpointError for a tokenizer that cannot be used, RecipeError for a token that a model does not have, and
    MissingDependencyError when transformers is not installed.
    """
    if models.donor is not None and not models.donor.exists:
        raise CheckpointError(f"{models.donor.name}: has no tokenizer files; name another model as tokenizer source")
    request = _request(settings, models)
    key = _key(request, models)
    record = catalog.vocabulary(key)
    if record is None:
        progress.start("merging tokenizers", 0)
        record = _build(request, models)
        progress.finish()
        catalog.keep_vocabulary(key, record)
        catalog.flush()
    return _vocabulary(record, settings, models)


def _request(settings: TokenizerSettings, models: TokenizerModels) -> Request:
    """Return what to build; the directories are named after the order of ``models.all()``."""
    order = list(models.references)
    sources = [
        SourceModel(tokenizer.name, _directory(index), tokenizer.exists) for index, tokenizer in enumerate(models.all())
    ]
    return Request(
        models=tuple(sources[: len(order)]),
        members=len(models.merged),
        base=order.index(models.base),
        union=settings.source == "union",
        donor=None if models.donor is None else sources[-1],
        tokens=tuple(setting.token for setting in settings.tokens),
        lookups=tuple((order.index(source.model), source.token or "") for source in _lookups(settings)),
    )


def _directory(index: int) -> str:
    """Return the name of a model's directory; it must not occur in messages of libraries by chance."""
    return f"mergefs-model-{index}"


def _lookups(settings: TokenizerSettings) -> list[OtherTokenSource]:
    """Return the sources that are named by the text of a token."""
    sources = [setting.source for setting in settings.tokens]
    return [source for source in sources if isinstance(source, OtherTokenSource) and source.token is not None]


def _key(request: Request, models: TokenizerModels) -> bytes:
    """Return a hash of all that the answer to ``request`` depends on; names are only for messages, but are told."""
    hasher = blake3(b"mergefs vocabulary %d\n" % _FORMAT)
    hasher.update(msgspec.msgpack.encode(request))
    for name in _LIBRARIES:
        hasher.update(f"{name} {_version(name)}\n".encode())
    for tokenizer in models.all():
        hasher.update(tokenizer.digest())
    return hasher.digest()


def _version(library: str) -> str | None:
    """Return the installed version of ``library``, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _build(request: Request, models: TokenizerModels) -> VocabularyRecord:
    """Build what the catalog does not have."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            "the recipe asks for a merged tokenizer, which transformers builds, and it is not installed; install it "
            "with `pip install 'mergefs[tokenizers]'`, or remove 'tokenizer' from the recipe"
        )
    with tempfile.TemporaryDirectory(prefix="mergefs-tokenizer-") as name:
        directory = Path(name)
        for index, tokenizer in enumerate(models.all()):
            place_files(directory / _directory(index), tokenizer.files)
        (directory / REQUEST).write_bytes(msgspec.msgpack.encode(request))
        last_words = run_builder(directory)
        if (directory / REFUSAL).is_file():
            refusal = msgspec.msgpack.decode((directory / REFUSAL).read_bytes(), type=Refusal)
            raise CheckpointError(refusal.sentence)
        if not (directory / ANSWER).is_file():
            raise MergefsError(
                f"the merged tokenizer could not be built ({quote(last_words)}); check the tokenizer files of the "
                "models, and the installation of transformers"
            )
        return msgspec.msgpack.decode((directory / ANSWER).read_bytes(), type=VocabularyRecord)


def run_builder(directory: Path) -> str:
    """Answer the request in ``directory``, in a process of its own so that this one stays without torch.

    Return what the process said last, or how it ended when it said nothing.
    """
    import subprocess

    finished = subprocess.run(
        [sys.executable, "-m", "mergefs.tokenizer"],
        cwd=directory,  # it comes first where Python looks for modules, so it must hold nobody else's
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    lines = finished.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {finished.returncode}"


def _environment() -> dict[str, str]:
    """Return the environment of the process: the same modules as here, and no network."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),  # noqa: PTH100 - "" is a path here
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _vocabulary(record: VocabularyRecord, settings: TokenizerSettings, models: TokenizerModels) -> MergedVocabulary:
    """Return the vocabulary of ``record``, padded as ``settings`` ask."""
    ids = np.frombuffer(record.ids, dtype="<i4")
    size = max(record.count, int(ids.max(initial=-1)) + 1)
    if settings.pad_to_multiple_of is not None:
        size = -(-size // settings.pad_to_multiple_of) * settings.pad_to_multiple_of
    used = np.zeros(size, dtype=np.bool_)
    used[ids] = True
    permutations = {}
    for model, packed in zip(models.references, record.permutations, strict=True):
        permutation = np.full(size, -1, dtype=np.int64)
        own = np.frombuffer(packed, dtype="<i4")
        permutation[: own.size] = own
        permutations[model] = permutation
    found = dict(zip(_lookups(settings), record.found_ids, strict=True))
    tokens = tuple(
        NamedToken(setting, number, found.get(setting.source) if isinstance(setting.source, OtherTokenSource) else None)
        for setting, number in zip(settings.tokens, record.token_ids, strict=True)
    )
    return MergedVocabulary(
        used=used,
        permutations=MappingProxyType(permutations),
        tokens=tokens,
        files=MappingProxyType(record.files),
        notes=record.notes,
    )
