"""Chat templates: the built-in ones render as mergekit's, and a model's own is found as transformers finds it."""

import json
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import mergekit._data.chat_templates
import pytest
from jinja2.exceptions import TemplateError
from tokenizers_models import TEXTS, word_level, write_tokenizer, write_tokenizer_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mergefs.recipe.tokenizer import BUILT_IN_CHAT_TEMPLATES
from mergefs.tokenizer.chat_template import built_in_template, chosen_template, own_template, with_template
from mergefs.tokenizer.files import FileContent, ModelTokenizer, is_tokenizer_file

INLINE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def conversations() -> list[list[dict[str, str]]]:
    """Return every conversation of up to four messages, also those that no model was trained on."""
    roles = ("system", "user", "assistant", "user_context")
    texts = ("", "  Be brief.\n", "What is\n2 + 2?", " Four. ", "{{ no template }}")
    repeated = [[{"role": role, "content": "Again."}] * 3 for role in roles]
    return repeated + [
        [{"role": role, "content": texts[(number + length) % len(texts)]} for number, role in enumerate(chosen)]
        for length in range(1, 5)
        for chosen in product(roles, repeat=length)
    ]


def rendered(template: str, conversation: list[dict[str, str]], prompt: bool) -> str | None:
    """Return what transformers makes of a conversation, None where the template refuses it."""
    try:
        texts, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=template,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
    except TemplateError:
        return None
    text: str = texts[0]
    return text


def model(directory: Path) -> ModelTokenizer:
    files: dict[str, FileContent] = {
        str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()
    }
    return ModelTokenizer(directory.name, {name: file for name, file in files.items() if is_tokenizer_file(name)})


def loaded(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
    return tokenizer


@pytest.mark.parametrize("name", BUILT_IN_CHAT_TEMPLATES)
def test_a_built_in_template_renders_as_that_of_mergekit(name: str) -> None:
    theirs = resources.files(mergekit._data.chat_templates).joinpath(f"{name}.jinja").read_text()
    ours = built_in_template(name)
    assert ours != theirs
    accepted = 0
    for conversation, prompt in product(conversations(), (False, True)):
        expected = rendered(theirs, conversation, prompt)
        assert rendered(ours, conversation, prompt) == expected, conversation
        accepted += expected is not None
    assert accepted > 10


def test_every_template_of_mergekit_is_built_in() -> None:
    files = resources.files(mergekit._data.chat_templates).iterdir()
    assert sorted(file.name for file in files if file.name.endswith(".jinja")) == [
        f"{name}.jinja" for name in sorted(BUILT_IN_CHAT_TEMPLATES)
    ]


# Where a model keeps its own


def as_file(directory: Path) -> None:
    write_tokenizer(directory, word_level(["a"]), chat_template="{{ 'in a file' }}")


def in_the_settings(directory: Path) -> None:
    write_tokenizer(directory, word_level(["a"]))
    change_settings(directory, chat_template="{{ 'in the settings' }}")


def as_a_list(directory: Path) -> None:
    write_tokenizer(directory, word_level(["a"]))
    named = [{"name": "tool_use", "template": "{{ 'tools' }}"}, {"name": "default", "template": "{{ 'listed' }}"}]
    change_settings(directory, chat_template=named)


def as_a_list_without_a_default(directory: Path) -> None:
    write_tokenizer(directory, word_level(["a"]))
    change_settings(directory, chat_template=[{"name": "tool_use", "template": "{{ 'tools' }}"}])


def as_several_files(directory: Path) -> None:
    write_tokenizer(
        directory, word_level(["a"]), chat_template={"default": "{{ 'one' }}", "tool_use": "{{ 'another' }}"}
    )


def as_files_without_a_default(directory: Path) -> None:
    as_several_files(directory)
    (directory / "chat_template.jinja").unlink()
    change_settings(directory, chat_template="{{ 'hidden by the files' }}")


def in_both(directory: Path) -> None:
    as_file(directory)
    change_settings(directory, chat_template="{{ 'hidden by the file' }}")


def nowhere(directory: Path) -> None:
    write_tokenizer(directory, word_level(["a"]))


def change_settings(directory: Path, **values: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FORMS = pytest.mark.parametrize(
    "write",
    [
        *(as_file, in_the_settings, as_a_list, as_a_list_without_a_default, as_several_files),
        *(as_files_without_a_default, in_both, nowhere),
    ],
)


@FORMS
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    theirs = loaded(tmp_path).chat_template
    assert own_template(model(tmp_path).files) == (theirs.get("default") if isinstance(theirs, dict) else theirs)


@FORMS
def test_a_template_that_is_set_is_the_only_one_then(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'of a processor' }}"}))
    files: dict[str, FileContent] = {**model(tmp_path).files, "chat_template.json": tmp_path / "chat_template.json"}
    before = loaded(tmp_path).get_vocab()
    for name, data in with_template(files, INLINE).items():
        (tmp_path / name).unlink(missing_ok=True)
        if data is not None:
            (tmp_path / name).write_bytes(data)
    assert loaded(tmp_path).chat_template == INLINE
    assert loaded(tmp_path).get_vocab() == before
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == INLINE
    assert not (tmp_path / "chat_template.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "no JSON", '{"chat_template": 7}'])
def test_settings_without_a_sound_template_have_none(content: str) -> None:
    assert own_template({"tokenizer_config.json": content.encode()}) is None


# Which one a recipe means


def test_auto_is_what_most_models_have_and_of_several_the_first(tmp_path: Path) -> None:
    def with_own(name: str, template: str | None) -> ModelTokenizer:
        settings = {} if template is None else {"chat_template": template}
        return model(write_tokenizer_model(tmp_path / name, word_level(TEXTS["fox"][0].split()), **settings))

    one, two = with_own("a", "{{ 'one' }}"), with_own("b", "{{ 'two' }}")
    other_two, none = with_own("c", "\n{{ 'two' }}\n"), with_own("d", None)
    assert chosen_template("auto", [one, two, other_two, none]) == "{{ 'two' }}"
    assert chosen_template("auto", [two, one]) == "{{ 'two' }}"
    assert chosen_template("auto", [one, two]) == "{{ 'one' }}"
    assert chosen_template("auto", [none]) is None


def test_a_template_of_the_recipe_is_taken_as_it_is() -> None:
    assert chosen_template(INLINE, []) == INLINE
