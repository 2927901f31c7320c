"""Builds merged tokenizers with transformers. Runs in a process of its own: transformers brings torch along.

The steps and their order are mergekit's, so that the same tokens get the same ids: see ``build``. What mergekit leaves
to the order of a hash table (tokens that several models add) follows the order of the models, and that of their ids.
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.records import VocabularyRecord
from mergefs.errors import CheckpointError
from mergefs.recipe.wording import quote
from mergefs.tokenizer.exchange import Request, SourceModel
from mergefs.tokenizer.files import CONFIG, TOKENIZER_CONFIG, collect_files

_LOG: Final = logging.getLogger(__name__)
_LOADING_CIRCUMSTANCES: Final = ("is_local", "local_files_only")
"""Keys of tokenizer_config.json that say how the tokenizer was loaded, not what it is."""

_EXAMPLES: Final = 3
"""How many tokens a note names."""

Tokens = dict[str, int]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model's tokenizer, and how many rows its embeddings have as far as config.json tells."""

    name: str
    tokenizer: Any
    vocabulary: Tokens
    rows: int | None

    @property
    def height(self) -> int:
        """The number of rows, or where that is not known the number of tokens."""
        return len(self.vocabulary) if self.rows is None else self.rows


def build(request: Request) -> VocabularyRecord:
    """Return the vocabulary that ``request`` asks for.

    The base's tokenizer without the tokens that lie beyond its embeddings is where ``union`` starts: tokens of the
    other models are added in the order of the models and of their ids, then the added tokens of all models with
    their settings, then the tokens of the recipe. Raises CheckpointError for a tokenizer that cannot be used.
    """
    notes: list[str] = []
    base = _load_stripped(request.models[request.base])
    loaded: dict[int, _Loaded] = {request.base: base}
    for index, model in enumerate(request.models):
        if index != request.base and model.exists:
            loaded[index] = _load(model)
        elif index != request.base:
            notes.append(f"{model.name} has no tokenizer; it is taken to have that of {base.name}")
    if request.union:
        others = (entry for index, entry in loaded.items() if index < request.members and entry is not base)
        tokenizer = _union(base, [base, *others], notes)
    else:
        tokenizer = base.tokenizer if request.donor is None else _load(request.donor).tokenizer
    present = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in dict.fromkeys(request.tokens) if token not in present])
    vocabulary = _in_order(tokenizer.get_vocab())
    if tokenizer is base.tokenizer:  # the base itself has the tokens now that were added: as in mergekit
        base = loaded[request.base] = replace(base, vocabulary=vocabulary)
    own = [loaded.get(index, base) for index in range(len(request.models))]
    permutations = [
        _permutation(vocabulary, replace(entry, name=model.name, rows=_rows(model)), request, notes)
        for entry, model in zip(own, request.models, strict=True)
    ]
    _tell_orphans(vocabulary, permutations[: request.members], request.tokens, notes)
    return VocabularyRecord(
        ids=np.unique(np.fromiter(vocabulary.values(), dtype="<i4")).tobytes(),
        count=len(vocabulary),
        token_ids=tuple(vocabulary[token] for token in request.tokens),
        found_ids=tuple(own[index].vocabulary.get(token, -1) for index, token in request.lookups),
        permutations=tuple(permutation.astype("<i4").tobytes() for permutation in permutations),
        files=_saved(tokenizer),
        notes=tuple(notes),
    )


def _in_order(vocabulary: Mapping[str, int]) -> Tokens:
    """Return ``vocabulary`` in the order of its ids; transformers gives it in the order of a hash table."""
    items = sorted(vocabulary.items(), key=itemgetter(1))
    if len(set(vocabulary.values())) < len(items):
        items.sort(key=lambda item: (item[1], item[0]))
    return dict(items)


def _load(model: SourceModel) -> _Loaded:
    """Load one tokenizer; no code of the model is run."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.directory, trust_remote_code=False, use_fast=True)
    except Exception as error:  # whatever a damaged or unknown tokenizer makes the library raise
        reason = " ".join(str(error).replace(model.directory, model.name).split())[:500] or type(error).__name__
        raise CheckpointError(
            f"{model.name}: its tokenizer cannot be loaded by transformers ({reason}); repair it, or remove "
            "'tokenizer' from the recipe to keep the tokenizer of the base"
        ) from error
    return _Loaded(model.name, tokenizer, _in_order(tokenizer.get_vocab()), _rows(model))


def _rows(model: SourceModel) -> int | None:
    """Return how many rows the embeddings of ``model`` have by its config.json, None when it does not tell."""
    path = Path(model.directory) / CONFIG
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    for section in (content.get("text_config"), content) if isinstance(content, dict) else ():
        rows = section.get("vocab_size") if isinstance(section, dict) else None
        if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
            return rows
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.directory, trust_remote_code=False)
        return int(config.get_text_config().vocab_size)
    except Exception as error:  # an architecture that transformers does not know, or one without a vocabulary
        _LOG.info("%s: the size of its vocabulary is not known (%s)", model.name, error)
        return None


def _load_stripped(model: SourceModel) -> _Loaded:
    """Load a tokenizer without the tokens that the model has no embeddings for."""
    if not model.exists:
        raise CheckpointError(
            f"{model.name}: has no tokenizer, which the merged one would start from; add its tokenizer files, or name "
            "another base_model"
        )
    base = _load(model)
    rows = base.height
    unused = {token for token, number in base.vocabulary.items() if number >= rows}
    if not unused:
        return base
    backend: Any = getattr(base.tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    if content["model"]["type"] != "BPE":
        raise CheckpointError(
            f"{model.name}: {len(unused)} of its tokens ({_examples(sorted(unused))}) have ids beyond the {rows} "
            f"rows of its embeddings, and they can be taken out of a BPE tokenizer only, not out of one of type "
            f"{content['model']['type']}; remove them from the tokenizer, or name another base_model"
        )
    _strip(content, unused, rows)
    base.tokenizer._tokenizer = type(backend).from_str(json.dumps(content))
    return replace(base, vocabulary=_in_order(base.tokenizer.get_vocab()))


def _strip(content: dict[str, Any], unused: set[str], rows: int) -> None:
    """Take ``unused`` tokens out of a BPE tokenizer's JSON, with the merges that need or make them."""
    model = content["model"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in unused}

    def kept(merge: str | Sequence[str]) -> bool:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        return unused.isdisjoint((first, second, first + second))

    model["merges"] = [merge for merge in model["merges"] if kept(merge)]


def _union(base: _Loaded, loaded: Sequence[_Loaded], notes: list[str]) -> Any:
    """Return the base's tokenizer with the tokens of all ``loaded`` ones, the base among them."""
    from transformers import AutoTokenizer

    added: dict[str, Any] = {}
    tokens: dict[str, None] = {}
    contested: set[str] = set()
    for entry in loaded:
        vocabulary, rows = entry.vocabulary, entry.height
        beyond = [token for token, number in vocabulary.items() if number >= rows]
        if beyond:
            notes.append(
                f"{entry.name}: {len(beyond)} of its tokens ({_examples(beyond)}) are left out, because their "
                f"ids lie beyond the {rows} rows of its embeddings"
            )
        tokens |= dict.fromkeys(token for token, number in vocabulary.items() if number < rows)
        for number, settings in sorted(entry.tokenizer.added_tokens_decoder.items()):
            if number < rows and added.setdefault(settings.content, settings) != settings:
                contested.add(settings.content)
    if contested:
        notes.append(
            f"{len(contested)} added tokens ({_examples(sorted(contested))}) have other settings in other "
            "models; those of the first model are kept"
        )
    with tempfile.TemporaryDirectory() as directory:
        # A copy, since the base's own vocabulary is still needed as it is.
        base.tokenizer.save_pretrained(directory, legacy_format=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, use_fast=True)
    missing = (token for token in tokens if token not in base.vocabulary)
    tokenizer.add_tokens([token for token in missing if token not in added])
    tokenizer.add_tokens(list(added.values()))
    return tokenizer


def _permutation(vocabulary: Tokens, model: _Loaded, request: Request, notes: list[str]) -> NDArray[np.int64]:
    """Return for each id of the merged vocabulary the row that the token has in ``model``, or -1."""
    rows = model.height
    found = np.fromiter(map(model.vocabulary.get, vocabulary, repeat(-1)), dtype=np.int64, count=len(vocabulary))
    beyond = found >= rows
    outside = [token for token, is_beyond in zip(vocabulary, beyond.tolist(), strict=True) if is_beyond]
    tokens = [token for token in outside if token not in request.tokens]  # the recipe says what those get
    if tokens:
        notes.append(
            f"{model.name}: {len(tokens)} tokens ({_examples(tokens)}) count as missing, because their ids lie "
            f"beyond the {rows} rows of its embeddings"
        )
    ids = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))
    permutation = np.full(int(ids.max(initial=-1)) + 1, -1, dtype=np.int64)
    permutation[ids] = np.where(beyond, -1, found)
    return permutation


def _tell_orphans(
    vocabulary: Tokens, permutations: Sequence[NDArray[np.int64]], configured: Sequence[str], notes: list[str]
) -> None:
    """Note the tokens that no model has an embedding for."""
    known = np.logical_or.reduce([permutation >= 0 for permutation in permutations])
    settled = set(configured)
    orphans = [token for token, number in vocabulary.items() if not known[number] and token not in settled]
    if orphans:
        notes.append(
            f"{len(orphans)} tokens ({_examples(orphans)}) are in none of the merged models; their embeddings are zero"
        )


def _examples(tokens: Sequence[str]) -> str:
    """Return the first few of ``tokens``, for a sentence."""
    return ", ".join(map(quote, tokens[:_EXAMPLES])) + (", ..." if len(tokens) > _EXAMPLES else "")


def _saved(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that transformers saves ``tokenizer`` as."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        path = directory / TOKENIZER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in _LOADING_CIRCUMSTANCES:
            config.pop(key, None)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return collect_files(directory)
