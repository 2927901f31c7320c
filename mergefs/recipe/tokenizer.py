"""Reads what a recipe says about the tokenizer and the chat template of the merged model."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from mergefs.recipe.conversion import to_bool, to_int
from mergefs.recipe.document import Entry, Place, ScalarItem, TableItem, describe
from mergefs.recipe.references import ModelReference, read_reference
from mergefs.recipe.wording import listed, nearest, quote, suggestion

AUTOMATIC_CHAT_TEMPLATE: Final = "auto"
BUILT_IN_CHAT_TEMPLATES: Final = ("alpaca", "chatml", "exaone", "llama3", "mistral")

_KEYS: Final = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS: Final = ("source", "force")
_KINDS: Final = ("model_token", "zero")
_MODEL_TOKEN_KEYS: Final = ("kind", "model", "token", "token_id")
_ZERO_KEYS: Final = ("kind",)
_WHOLE_VOCABULARIES: Final = ("union", "base")
_SHORTEST_INLINE_TEMPLATE: Final = 20  # characters; mergekit takes nothing shorter for a template
_LARGEST_INTEGER: Final = 2**31 - 1  # more tokens than any vocabulary has


@dataclass(frozen=True, slots=True)
class ZeroSource:
    """The embedding of a token is zero."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A token gets the embedding that it has in one model."""

    model: ModelReference


@dataclass(frozen=True, slots=True)
class OtherTokenSource:
    """A token gets the embedding of another token of one model: named by its text or its id, and the other is None."""

    model: ModelReference
    token: str | None
    token_id: int | None


TokenSource: TypeAlias = ZeroSource | ModelSource | OtherTokenSource


@dataclass(frozen=True, slots=True)
class TokenSetting:
    """What a recipe says about one token of the merged vocabulary, which gets it when no model has it.

    Without ``force`` the source is for the models that lack the token, with it for all models. ``source`` is None when
    the recipe names none, which is enough for a token that every model has.
    """

    token: str
    source: TokenSource | None
    force: bool
    place: Place = field(compare=False)


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """How the merged model gets its tokenizer.

    ``source`` is ``union`` (every token of every model), ``base`` (those of the base, or without one of the first
    model), or a model. The vocabulary is padded with unused ids to a multiple of ``pad_to_multiple_of``.
    """

    source: Literal["union", "base"] | ModelReference
    tokens: tuple[TokenSetting, ...] = ()
    pad_to_multiple_of: int | None = None

    def sources(self) -> Iterator[tuple[TokenSetting, ModelReference]]:
        """Yield the tokens that get the embedding of a model, with that model."""
        for setting in self.tokens:
            if isinstance(setting.source, ModelSource | OtherTokenSource):
                yield setting, setting.source.model


def read_tokenizer(document: TableItem) -> TokenizerSettings | None:
    """Return what ``tokenizer`` or ``tokenizer_source`` of a recipe say, None when neither is set.

    Raises RecipeError, with its line, when both are, and for what no merged tokenizer can be made from.
    """
    short, long = document.get("tokenizer_source"), document.get("tokenizer")
    if short is not None and long is not None:
        raise long.place.error(
            f"'tokenizer' cannot be used together with 'tokenizer_source' of line {short.place.line}; keep one of them"
        )
    if short is not None:
        return TokenizerSettings(_vocabulary(short))
    return None if long is None else _settings(long)


def read_chat_template(entry: Entry | None) -> str | None:
    """Return ``auto``, the name of a built-in template, or a template in Jinja; None when the key is not set.

    Raises RecipeError, with its line, for what is none of them.
    """
    if entry is None:
        return None
    wanted = f"auto, one of {listed(BUILT_IN_CHAT_TEMPLATES)}, or a template in Jinja"
    item = entry.value
    if not isinstance(item, ScalarItem) or not isinstance(item.value, str):
        raise item.place.error(f"{entry.key!r} must be {wanted}, not {describe(item)}; change it")
    text = item.value
    if text == AUTOMATIC_CHAT_TEMPLATE or text in BUILT_IN_CHAT_TEMPLATES:
        return text
    if "{" in text and len(text) >= _SHORTEST_INLINE_TEMPLATE:
        return text
    match = nearest(text, (AUTOMATIC_CHAT_TEMPLATE, *BUILT_IN_CHAT_TEMPLATES))
    hint = f"did you mean {match!r}?" if match else f"give {wanted}, of at least {_SHORTEST_INLINE_TEMPLATE} characters"
    raise item.place.error(f"{quote(text)} is not a chat template; {hint}")


def check_token_sources(settings: TokenizerSettings, models: Collection[ModelReference]) -> None:
    """Refuse a token that gets the embedding of a model which is not among ``models``: those that are merged."""
    for setting, model in settings.sources():
        if model not in models:
            names = [known.text for known in models]
            raise setting.place.error(
                f"token {quote(setting.token)} gets its embedding from model {quote(model.text)}, which takes no part "
                f"in the merge; {suggestion(model.text, names)}"
            )


def _vocabulary(entry: Entry) -> Literal["union", "base"] | ModelReference:
    """Return where the vocabulary comes from."""
    item = entry.value
    if isinstance(item, ScalarItem) and item.value == "union":
        return "union"
    if isinstance(item, ScalarItem) and item.value == "base":
        return "base"
    return read_reference(entry)


def _settings(entry: Entry) -> TokenizerSettings:
    table = entry.value
    if not isinstance(table, TableItem):
        raise table.place.error(
            f"'tokenizer' must be a mapping, not {describe(table)}; write `tokenizer: {{source: union}}`, where the "
            f"source is one of {listed(_WHOLE_VOCABULARIES)}, or a model"
        )
    _check_keys(table, _KEYS, "'tokenizer'")
    source = table.get("source")
    return TokenizerSettings(
        source="union" if source is None else _vocabulary(source),
        tokens=_tokens(table.get("tokens")),
        pad_to_multiple_of=_multiple(table.get("pad_to_multiple_of")),
    )


def _multiple(entry: Entry | None) -> int | None:
    """Return what the size of the vocabulary must be a multiple of; zero means anything, as in mergekit."""
    return None if entry is None else _whole_number(entry) or None


def _tokens(entry: Entry | None) -> tuple[TokenSetting, ...]:
    if entry is None:
        return ()
    if not isinstance(entry.value, TableItem):
        raise entry.value.place.error(
            f"'tokens' must be a mapping of tokens to their settings, not {describe(entry.value)}; write for example "
            "`tokens: {'<|im_start|>': {source: MODEL}}`"
        )
    return tuple(_token(token) for token in entry.value)


def _token(entry: Entry) -> TokenSetting:
    table = entry.value
    if not entry.key:
        raise entry.place.error("a token of 'tokens' is empty text, which no tokenizer can have; remove it")
    if not isinstance(table, TableItem):
        raise table.place.error(
            f"the settings of token {quote(entry.key)} must be a mapping, not {describe(table)}; write "
            "`{source: MODEL}`, or `{source: {kind: zero}}`"
        )
    _check_keys(table, _TOKEN_KEYS, f"token {quote(entry.key)}")
    force = table.get("force")
    setting = TokenSetting(
        token=entry.key,
        source=_source(table.get("source")),
        force=force is not None and _truth(force),
        place=entry.place,
    )
    if setting.force and setting.source is None:
        raise entry.place.error(
            f"token {quote(entry.key)} is to get another embedding in every model ('force'), but no 'source' says "
            "which; add one"
        )
    return setting


def _source(entry: Entry | None) -> TokenSource | None:
    """Return where the embedding of a token comes from."""
    if entry is None:
        return None
    table = entry.value
    if not isinstance(table, TableItem) or "kind" not in table.entries:
        return ModelSource(read_reference(entry))
    kind = table.entries["kind"]
    name = kind.value.value if isinstance(kind.value, ScalarItem) else None
    if name == "zero":
        _check_keys(table, _ZERO_KEYS, "a source of kind zero")
        return ZeroSource()
    if name != "model_token":
        hint = suggestion(name, _KINDS) if isinstance(name, str) else f"the known ones are {listed(_KINDS)}"
        raise kind.value.place.error(f"{describe(kind.value)} is not a kind of source for a token; {hint}")
    _check_keys(table, _MODEL_TOKEN_KEYS, "a source of kind model_token")
    model, token, token_id = (table.get(key) for key in ("model", "token", "token_id"))
    if model is None:
        raise table.place.error("a source of kind model_token names no model; add `model: MODEL` to it")
    if (token is None) == (token_id is None):
        found = "neither 'token' nor 'token_id'" if token is None else "both 'token' and 'token_id'"
        raise table.place.error(f"a source of kind model_token has {found}; give exactly one of them")
    return OtherTokenSource(
        model=read_reference(model),
        token=None if token is None else _text(token),
        token_id=None if token_id is None else _whole_number(token_id),
    )


def _text(entry: Entry) -> str:
    item = entry.value
    if not isinstance(item, ScalarItem) or not isinstance(item.value, str):
        raise item.place.error(f"{entry.key!r} must be text, not {describe(item)}; put it in quotes")
    return item.value


def _whole_number(entry: Entry) -> int:
    item = entry.value
    refusal = item.place.error(
        f"{entry.key!r} must be a whole number from 0 to {_LARGEST_INTEGER}, not {describe(item)}; correct the value"
    )
    if not isinstance(item, ScalarItem):
        raise refusal
    try:
        number = to_int(item.value)
    except ValueError:
        raise refusal from None
    if not 0 <= number <= _LARGEST_INTEGER:
        raise refusal
    return number


def _truth(entry: Entry) -> bool:
    item = entry.value
    try:
        return to_bool(item.value if isinstance(item, ScalarItem) else None)
    except ValueError:
        raise item.place.error(
            f"{entry.key!r} must be true or false, not {describe(item)}; correct the value"
        ) from None


def _check_keys(table: TableItem, known: tuple[str, ...], what: str) -> None:
    for entry in table:
        if entry.key not in known:
            raise entry.place.error(f"{quote(entry.key)} is not a key of {what}; {suggestion(entry.key, known)}")
