"""The chat template of the merged model: which one a recipe means, and the files that hold it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Final

from mergefs.recipe.tokenizer import AUTOMATIC_CHAT_TEMPLATE, BUILT_IN_CHAT_TEMPLATES
from mergefs.tokenizer.files import (
    ADDITIONAL_CHAT_TEMPLATES,
    CHAT_TEMPLATE,
    PROCESSOR_CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    FileContent,
    ModelTokenizer,
    read_content,
)

_KEY: Final = "chat_template"
_DEFAULT: Final = "default"


def chosen_template(setting: str, models: Iterable[ModelTokenizer]) -> str | None:
    """Return the text of the template that a recipe's ``chat_template`` means.

    ``auto`` is the one that most of ``models`` have, of several the first; None when none has any.
    """
    if setting == AUTOMATIC_CHAT_TEMPLATE:
        found = Counter(template.strip() for model in models if (template := own_template(model.files)))
        return found.most_common(1)[0][0] if found else None
    return built_in_template(setting) if setting in BUILT_IN_CHAT_TEMPLATES else setting


def built_in_template(name: str) -> str:
    """Return the text of a built-in template."""
    path = resources.files("mergefs.tokenizer").joinpath("chat_templates").joinpath(f"{name}.jinja")
    return path.read_text(encoding="utf-8")


def own_template(files: Mapping[str, FileContent]) -> str | None:
    """Return the default chat template of a tokenizer as transformers finds it, None when it has none."""
    named = {name: content for name, content in files.items() if name.startswith(ADDITIONAL_CHAT_TEMPLATES)}
    if CHAT_TEMPLATE in files:
        return read_content(files[CHAT_TEMPLATE]).decode("utf-8", errors="replace")
    if named:
        default = named.get(f"{ADDITIONAL_CHAT_TEMPLATES}{_DEFAULT}.jinja")
        return None if default is None else read_content(default).decode("utf-8", errors="replace")
    template = _tokenizer_config(files).get(_KEY)
    if isinstance(template, list):
        pairs = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in pairs}
    if isinstance(template, dict):
        template = template.get(_DEFAULT)
    return template if isinstance(template, str) else None


def with_template(files: Mapping[str, FileContent], template: str) -> dict[str, bytes | None]:
    """Return what has to change in ``files`` of a model for ``template`` to be its only one; None means to leave out.

    It goes into the file of its own that transformers reads first, and into tokenizer_config.json for programs that
    know no such file.
    """
    changes: dict[str, bytes | None] = {CHAT_TEMPLATE: template.encode()}
    if TOKENIZER_CONFIG in files:
        config = _tokenizer_config(files) | {_KEY: template}
        changes[TOKENIZER_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    outdated = (PROCESSOR_CHAT_TEMPLATE, ADDITIONAL_CHAT_TEMPLATES)
    return changes | {name: None for name in files if name.startswith(outdated)}


def _tokenizer_config(files: Mapping[str, FileContent]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; nothing where it is missing or no JSON object."""
    if TOKENIZER_CONFIG not in files:
        return {}
    try:
        content = json.loads(read_content(files[TOKENIZER_CONFIG]))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
