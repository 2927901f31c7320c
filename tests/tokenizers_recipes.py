"""Merged vocabularies of recipes, made without planning the merge."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mergefs.catalog import Catalog
from mergefs.progress import Silence
from mergefs.recipe.document import TableItem, parse_documents
from mergefs.recipe.references import ModelReference
from mergefs.recipe.tokenizer import read_tokenizer
from mergefs.tokenizer import __main__ as builder
from mergefs.tokenizer import service
from mergefs.tokenizer.files import FileContent, ModelTokenizer, is_tokenizer_file
from mergefs.tokenizer.service import TokenizerModels, merged_vocabulary
from mergefs.tokenizer.vocabulary import MergedVocabulary


def build_in_this_process(directory: Path) -> str:
    """Do what ``run_builder`` does without a process of its own: transformers is imported here anyway."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        builder.main()
    finally:
        os.chdir(before)
    return ""


@pytest.fixture
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build tokenizers in the process of the test."""
    monkeypatch.setattr(service, "run_builder", build_in_this_process)
    yield


def reference(path: object) -> ModelReference:
    return ModelReference(str(path), str(path), None, None)


def tokenizer_of(directory: Path) -> ModelTokenizer:
    """Return what is known of the tokenizer in a model directory."""
    files: dict[str, FileContent] = {
        name: directory / name
        for name in sorted(os.listdir(directory))  # noqa: PTH208 - names are wanted
        if is_tokenizer_file(name) or name == "config.json"
    }
    return ModelTokenizer(str(directory), files)


def vocabulary_of(document: Mapping[str, Any], catalog: Path) -> MergedVocabulary:
    """Return the merged vocabulary that a recipe asks for."""
    (item,) = parse_documents(json.dumps(dict(document)), "<recipe>")
    assert isinstance(item, TableItem)
    settings = read_tokenizer(item)
    assert settings is not None
    names = [entry["model"] for entry in document["models"]]
    names = list(dict.fromkeys([*names, document.get("base_model", names[0])]))
    donor = None if isinstance(settings.source, str) else tokenizer_of(Path(settings.source.path))
    models = TokenizerModels(
        merged={reference(name): tokenizer_of(Path(name)) for name in names},
        base=reference(document.get("base_model", names[0])),
        donor=donor,
    )
    with Catalog(catalog) as opened:
        return merged_vocabulary(settings, models, opened, Silence())
