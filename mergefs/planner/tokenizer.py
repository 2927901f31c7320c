"""The tokenizer of the merged model: the merged vocabulary of a recipe, and the files that change with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.auxiliary import find_auxiliary_files
from mergefs.checkpoint.source import AuxiliaryFile
from mergefs.planner.plan import FileContent, InputModel
from mergefs.progress import Progress
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import find_model
from mergefs.recipe.references import ModelReference
from mergefs.tokenizer.files import CONFIG, ModelTokenizer, is_tokenizer_file
from mergefs.tokenizer.files import FileContent as TokenizerFile

if TYPE_CHECKING:
    from mergefs.tokenizer.service import TokenizerModels
    from mergefs.tokenizer.vocabulary import MergedVocabulary

_TOKEN_IDS: Final = ("_token_id", "_token_index")
"""What keys of config.json end with whose values are ids of tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerPlan:
    """What a recipe says about the tokenizer comes to this.

    ``vocabulary`` is None where every model keeps its rows. ``companions`` are the files of the merged model beside its
    weights that no merge changes otherwise: the donor's, with the tokenizer and the chat template of the recipe.
    ``digest`` identifies what has been changed, None where nothing has.
    """

    vocabulary: "MergedVocabulary | None"
    companions: Mapping[str, FileContent]
    digest: str | None
    notes: tuple[str, ...]


def plan_tokenizer(
    recipe: Recipe,
    models: Mapping[ModelReference, InputModel],
    stand_in: tuple[ModelReference, InputModel] | None,
    donor: InputModel,
    catalog: Catalog,
    progress: Progress,
) -> TokenizerPlan:
    """Return the tokenizer that ``recipe`` asks for, whose ``models`` have been opened.

    ``stand_in`` is the base where it is none of ``models``, or what stands in for one. Raises the errors of
    ``merged_vocabulary``, and of models that are not found.
    """
    if recipe.tokenizer is None and recipe.chat_template is None:
        return TokenizerPlan(None, donor.files, None, ())
    taking_part = _tokenizer_models(recipe, models, stand_in)
    files, notes = dict(donor.files), list[str]()
    hasher = blake3()
    vocabulary = None
    if recipe.tokenizer is not None:
        from mergefs.tokenizer.service import merged_vocabulary

        vocabulary = merged_vocabulary(recipe.tokenizer, taking_part, catalog, progress)
        files = {name: content for name, content in files.items() if not is_tokenizer_file(name)} | dict(
            vocabulary.files
        )
        notes += vocabulary.notes
        notes += _moved_tokens(donor, vocabulary.permutations[taking_part.base])
        hasher.update(vocabulary.digest().encode())
    if recipe.chat_template is not None:
        changes = _with_chat_template(recipe.chat_template, files, donor, taking_part, notes)
        for name, content in changes.items():
            files.pop(name, None)
            hasher.update(f"{name!r} {content is None}".encode())
            if content is not None:
                files[name] = content
                hasher.update(f"{len(content)}".encode() + content)
    return TokenizerPlan(vocabulary, MappingProxyType(files), hasher.hexdigest(length=16), tuple(notes))


def _moved_tokens(donor: InputModel, permutation: NDArray[np.int64]) -> list[str]:
    """Return a note where config.json names tokens by ids that they do not have in the merged vocabulary.

    ``permutation`` gives the donor's id of the token that has an id there.
    """
    text = donor.config.get("text_config")
    moved: list[str] = []
    for section in (donor.config, text if isinstance(text, Mapping) else {}):
        for key, value in section.items():
            numbers = value if isinstance(value, list) else [value]
            if not key.endswith(_TOKEN_IDS) or not all(type(number) is int for number in numbers):
                continue
            for number in numbers:
                now = np.flatnonzero(permutation == number)
                if number >= 0 and number not in now.tolist():  # -1 is for none
                    moved.append(f"{key} {number} {f'is {now[0]} now' if now.size else 'is gone'}")
    if not moved:
        return []
    return [
        f"config.json of {donor.title} names tokens by ids that they do not have in the merged vocabulary "
        f"({', '.join(dict.fromkeys(moved))}); correct them in the merged model"
    ]


def _with_chat_template(
    setting: str, files: Mapping[str, FileContent], donor: InputModel, models: "TokenizerModels", notes: list[str]
) -> Mapping[str, bytes | None]:
    """Return what the chat template changes in ``files``."""
    from mergefs.tokenizer.chat_template import chosen_template, with_template

    tokenizer = _tokenizer(donor.title, files)
    if not tokenizer.exists:
        notes.append(f"the chat template has no effect, because {donor.title} has no tokenizer that it could belong to")
        return {}
    template = chosen_template(setting, models.merged.values())
    if template is None:
        notes.append("none of the models has a chat template, so 'chat_template: auto' changes nothing")
        return {}
    return with_template({name: _content(content) for name, content in files.items()}, template)


def _tokenizer_models(
    recipe: Recipe,
    models: Mapping[ModelReference, InputModel],
    stand_in: tuple[ModelReference, InputModel] | None,
) -> "TokenizerModels":
    """Return the tokenizers of all models of ``recipe``, and of the model that gives the vocabulary."""
    from mergefs.tokenizer.service import TokenizerModels

    merged = {reference: _tokenizer(model.title, model.files) for reference, model in models.items()}
    others: dict[ModelReference, ModelTokenizer] = {}
    if stand_in is not None and stand_in[0] not in merged:
        group = merged if stand_in[0] == recipe.base else others
        group[stand_in[0]] = _tokenizer(stand_in[1].title, stand_in[1].files)
    donor = None
    if recipe.tokenizer is not None and isinstance(recipe.tokenizer.source, ModelReference):
        source = recipe.tokenizer.source
        donor = merged.get(source) or _elsewhere(source, recipe)
    return TokenizerModels(merged=merged, base=recipe.base or next(iter(merged)), donor=donor, others=others)


def _elsewhere(reference: ModelReference, recipe: Recipe) -> ModelTokenizer:
    """Return the tokenizer of a model that takes no part in the merge; it needs no weights."""
    directory = find_model(reference, recipe)
    return _tokenizer(str(directory), {file.name: file for file in find_auxiliary_files(directory)})


def _tokenizer(title: str, files: Mapping[str, FileContent]) -> ModelTokenizer:
    """Return what is known of the tokenizer among ``files``."""
    kept = {name: _content(files[name]) for name in files if name == CONFIG or is_tokenizer_file(name)}
    return ModelTokenizer(title, kept)


def _content(content: FileContent) -> TokenizerFile:
    return content.path if isinstance(content, AuxiliaryFile) else content
