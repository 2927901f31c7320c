"""What a recipe may say about the tokenizer and the chat template, and what it is told when it says something else."""

from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import ValidationError

from mergefs.errors import RecipeError
from mergefs.recipe.document import TableItem, parse_documents
from mergefs.recipe.references import ModelReference
from mergefs.recipe.tokenizer import (
    BUILT_IN_CHAT_TEMPLATES,
    ModelSource,
    OtherTokenSource,
    TokenizerSettings,
    ZeroSource,
    check_token_sources,
    read_chat_template,
    read_tokenizer,
)

A, B = (ModelReference(name, name, None, None) for name in ("org/a", "org/b"))


def table(text: str) -> TableItem:
    (item,) = parse_documents(dedent(text), "<recipe>")
    assert isinstance(item, TableItem)
    return item


def read(text: str) -> TokenizerSettings:
    found = read_tokenizer(table(text))
    assert found is not None
    return found


def template(text: str) -> str | None:
    return read_chat_template(table(text).get("chat_template"))


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return str(caught.value)


# What it means


@pytest.mark.parametrize("text", ["merge_method: linear", "tokenizer: null", "tokenizer_source:"])
def test_without_settings_there_is_no_merged_tokenizer(text: str) -> None:
    assert read_tokenizer(table(text)) is None


@pytest.mark.parametrize(
    ("written", "source"),
    [("union", "union"), ("base", "base"), ("org/a", A), ("{model: {path: org/b}}", B)],
)
def test_the_vocabulary_is_a_union_or_that_of_the_base_or_of_a_model(written: str, source: object) -> None:
    assert read(f"tokenizer_source: {written}") == TokenizerSettings(source)  # type: ignore[arg-type]
    assert read(f"tokenizer: {{source: {written}}}") == TokenizerSettings(source)  # type: ignore[arg-type]


def test_an_empty_tokenizer_is_a_union() -> None:
    assert read("tokenizer: {}") == TokenizerSettings("union")


def test_every_source_of_a_token_is_read() -> None:
    found = read("""
        tokenizer:
          source: base
          pad_to_multiple_of: 64
          tokens:
            <a>: {source: org/a}
            <b>: {source: {model: {path: org/b}}, force: true}
            <c>: {source: {kind: zero}, force: yes}
            <d>: {source: {kind: model_token, model: org/b, token: <x>}}
            <e>: {source: {kind: model_token, model: org/b, token_id: 7}}
            <f>: {}
    """)
    assert (found.source, found.pad_to_multiple_of) == ("base", 64)
    assert [(setting.token, setting.source, setting.force) for setting in found.tokens] == [
        ("<a>", ModelSource(A), False),
        ("<b>", ModelSource(B), True),
        ("<c>", ZeroSource(), True),
        ("<d>", OtherTokenSource(B, "<x>", None), False),
        ("<e>", OtherTokenSource(B, None, 7), False),
        ("<f>", None, False),
    ]
    assert found.tokens[3].place.line == 9
    assert [(setting.token, model) for setting, model in found.sources()] == [
        *(("<a>", A), ("<b>", B), ("<d>", B), ("<e>", B)),
    ]


@pytest.mark.parametrize(("written", "number"), [("8", 8), ("'8'", 8), ("8.0", 8), ("0", None), ("null", None)])
def test_the_padding_is_read_as_mergekit_reads_numbers(written: str, number: int | None) -> None:
    text = f"tokenizer: {{pad_to_multiple_of: {written}}}"
    assert read(text).pad_to_multiple_of == number
    theirs = TokenizerConfig.model_validate(yaml.safe_load(text)["tokenizer"])
    assert (theirs.pad_to_multiple_of or None) == number


@pytest.mark.parametrize("name", ["auto", *BUILT_IN_CHAT_TEMPLATES])
def test_a_chat_template_is_named(name: str) -> None:
    assert template(f"chat_template: {name}") == name


def test_a_chat_template_is_written_in_the_recipe() -> None:
    text = """
        chat_template: |
          {% for message in messages %}
          {{ message['content'] }}
          {% endfor %}
    """
    assert template(text) == "{% for message in messages %}\n{{ message['content'] }}\n{% endfor %}\n"


def test_no_chat_template_is_no_chat_template() -> None:
    assert template("chat_template: null") is None


# What is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "tokenizer_source: union\ntokenizer: {source: base}",
            "<recipe>:2: 'tokenizer' cannot be used together with 'tokenizer_source' of line 1; keep one of them",
        ),
        (
            "tokenizer: union",
            "<recipe>:1: 'tokenizer' must be a mapping, not 'union'; write `tokenizer: {source: union}`, where the "
            "source is one of union, base, or a model",
        ),
        ("tokenizer: {sorce: union}", "<recipe>:1: 'sorce' is not a key of 'tokenizer'; did you mean 'source'?"),
        (
            "tokenizer: {pad_to_multiple_of: -8}",
            "<recipe>:1: 'pad_to_multiple_of' must be a whole number from 0 to 2147483647, not -8; correct the value",
        ),
        (
            "tokenizer: {pad_to_multiple_of: true}",
            "<recipe>:1: 'pad_to_multiple_of' must be a whole number from 0 to 2147483647, not true; correct the value",
        ),
        (
            "tokenizer: {tokens: [<a>]}",
            "<recipe>:1: 'tokens' must be a mapping of tokens to their settings, not a list; write for example "
            "`tokens: {'<|im_start|>': {source: MODEL}}`",
        ),
        (
            "tokenizer: {tokens: {<a>: org/a}}",
            "<recipe>:1: the settings of token '<a>' must be a mapping, not 'org/a'; write `{source: MODEL}`, or "
            "`{source: {kind: zero}}`",
        ),
        (
            "tokenizer: {tokens: {'': {source: org/a}}}",
            "<recipe>:1: a token of 'tokens' is empty text, which no tokenizer can have; remove it",
        ),
        (
            "tokenizer:\n  tokens:\n    <a>: {source: org/a, forced: true}",
            "<recipe>:3: 'forced' is not a key of token '<a>'; did you mean 'force'?",
        ),
        (
            "tokenizer: {tokens: {<a>: {force: true}}}",
            "<recipe>:1: token '<a>' is to get another embedding in every model ('force'), but no 'source' says which; "
            "add one",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: org/a, force: perhaps}}}",
            "<recipe>:1: 'force' must be true or false, not 'perhaps'; correct the value",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: zeros}}}}",
            "<recipe>:1: 'zeros' is not a kind of source for a token; did you mean 'zero'?",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: [zero]}}}}",
            "<recipe>:1: a list is not a kind of source for a token; the known ones are model_token, zero",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: zero, token: b}}}}",
            "<recipe>:1: 'token' is not a key of a source of kind zero; the known ones are kind",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, token: b}}}}",
            "<recipe>:1: a source of kind model_token names no model; add `model: MODEL` to it",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: b}}}}",
            "<recipe>:1: a source of kind model_token has neither 'token' nor 'token_id'; give exactly one of them",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: b, token: c, token_id: 4}}}}",
            "<recipe>:1: a source of kind model_token has both 'token' and 'token_id'; give exactly one of them",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: b, token: 4}}}}",
            "<recipe>:1: 'token' must be text, not 4; put it in quotes",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: b, token_id: x}}}}",
            "<recipe>:1: 'token_id' must be a whole number from 0 to 2147483647, not 'x'; correct the value",
        ),
        (
            "tokenizer: {source: [union]}",
            "<recipe>:1: 'source' must be text, not a list; write a path or a Hub name, in quotes when it looks like a "
            "number",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, sentence: str) -> None:
    assert refusal(text) == sentence


@pytest.mark.parametrize(
    "source",
    ["elsewhere/c", "{kind: model_token, model: elsewhere/c, token: x}"],
)
def test_tokens_come_from_models_that_take_part(source: str) -> None:
    found = read(f"tokenizer:\n  tokens:\n    <a>: {{source: {source}}}\n    <b>: {{source: org/a}}")
    with pytest.raises(RecipeError) as caught:
        check_token_sources(found, (A, B))
    assert str(caught.value) == (
        "<recipe>:3: token '<a>' gets its embedding from model 'elsewhere/c', which takes no part in the merge; the "
        "known ones are org/a, org/b"
    )


def test_the_whole_vocabulary_may_come_from_a_model_that_takes_no_part() -> None:
    check_token_sources(read("tokenizer_source: elsewhere/c"), (A, B))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("chatlm", "<recipe>:1: 'chatlm' is not a chat template; did you mean 'chatml'?"),
        (
            "'{{ messages }}'",
            "<recipe>:1: '{{ messages }}' is not a chat template; give auto, one of alpaca, chatml, exaone, llama3, "
            "mistral, or a template in Jinja, of at least 20 characters",
        ),
        (
            "[chatml]",
            "<recipe>:1: 'chat_template' must be auto, one of alpaca, chatml, exaone, llama3, mistral, or a template "
            "in Jinja, not a list; change it",
        ),
    ],
)
def test_what_is_no_chat_template_is_refused(written: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        template(f"chat_template: {written}")
    assert str(caught.value) == sentence


# Everything that mergekit refuses is refused, and nothing ends in a traceback

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["union", "base", "zero", "model_token", "org/a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["source", "tokens", "pad_to_multiple_of", "kind", "model", "token", "token_id", "force", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
@example({"tokens": {"a": {"source": {"kind": "model_token", "model": "org/a", "token_id": 3}}}})
def test_what_mergekit_refuses_is_refused(value: Any) -> None:
    try:
        theirs = None if value is None else TokenizerConfig.model_validate(value)
    except (ValidationError, RuntimeError):
        theirs = "refused"
    try:
        ours = read_tokenizer(table(yaml.safe_dump({"tokenizer": value})))
    except RecipeError:
        return
    if theirs == "refused":
        assert _without_nulls(value) != value  # keys without a value are not set here
    elif ours is not None and theirs is not None:
        assert list(theirs.tokens or {}) == [setting.token for setting in ours.tokens]
        assert (theirs.pad_to_multiple_of or None) == ours.pad_to_multiple_of


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
