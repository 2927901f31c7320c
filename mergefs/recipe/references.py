"""Which models a recipe names, and where they are."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from mergefs.errors import DownloadError, RecipeError
from mergefs.recipe.document import Entry, ScalarItem, TableItem, describe
from mergefs.recipe.hub import find_on_hub, hub_cache, is_hub_name
from mergefs.recipe.wording import quote, suggestion

_MODEL_KEYS: Final = ("model", "lora", "override_architecture")
_PATH_KEYS: Final = ("path", "revision")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model as a recipe names it: a directory or a Hub name, perhaps at a revision or with an adapter.

    ``text`` is the whole reference in mergekit's short form, ``path[@revision][+adapter[@revision]]``; ``adapter`` is
    named like a model. ``architecture`` takes the place of the one in its config.json. Two references are the same
    model when they are equal, wherever they stand: ``line`` is that of the recipe, None for one of the command line.
    """

    text: str
    path: str
    revision: str | None
    adapter: "ModelReference | None"
    architecture: str | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def without_adapter(self) -> "ModelReference":
        """The model alone."""
        if self.adapter is None:
            return self
        text = self.text.removesuffix(f"+{self.adapter.text}")
        return ModelReference(text, self.path, self.revision, None, line=self.line)


def read_reference(entry: Entry) -> ModelReference:
    """Return the model that ``entry`` names, as text or as ``{model: {path, revision}, lora: {path, revision}}``.

    Raises RecipeError, with its line, when it is none.
    """
    item = entry.value
    if not isinstance(item, TableItem):
        return _with_adapter(entry, _text(entry))
    _check_keys(item, _MODEL_KEYS, "a model")
    inner = item.get("model")
    if inner is None:
        raise item.place.error(f"the mapping of {entry.key!r} has no model; add `model: PATH` to it")
    model = _located(inner, "a model's location")
    lora = item.get("lora")
    reference = model if lora is None else _joined(model, _located(lora, "an adapter's location"))
    architecture = item.get("override_architecture")
    return reference if architecture is None else replace(reference, architecture=_text(architecture))


def _with_adapter(entry: Entry, text: str) -> ModelReference:
    """Return the model of a short form, which may name an adapter after a plus sign."""
    path, plus, adapter = text.partition("+")
    if not plus:
        return _from_text(entry, text)
    if "+" in adapter or not path or not adapter:
        raise entry.value.place.error(
            f"{quote(text)} is not of the form MODEL+ADAPTER; merge several adapters one by one, and write a path that "
            "contains a + as `model: {model: {path: PATH}}`"
        )
    return _joined(_from_text(entry, path), _from_text(entry, adapter))


def _joined(model: ModelReference, adapter: ModelReference) -> ModelReference:
    return ModelReference(f"{model.text}+{adapter.text}", model.path, model.revision, adapter, line=model.line)


def _located(entry: Entry, what: str) -> ModelReference:
    """Return what ``entry`` locates, as text or as ``{path, revision}``; a plus sign has no meaning there."""
    if not isinstance(entry.value, TableItem):
        return _from_text(entry, _text(entry))
    _check_keys(entry.value, _PATH_KEYS, what)
    path_entry = entry.value.get("path")
    if path_entry is None:
        raise entry.place.error(f"{what} has no path; add `path: PATH` to it")
    path = _text(path_entry)
    revision_entry = entry.value.get("revision")
    revision = None if revision_entry is None else _text(revision_entry)
    text = path if revision is None else f"{path}@{revision}"
    return ModelReference(text, path, revision, None, line=path_entry.value.place.line)


def _from_text(entry: Entry, text: str) -> ModelReference:
    path, at, revision = text.partition("@")
    if "@" in revision:
        raise entry.value.place.error(
            f"{quote(text)} has more than one @, so its revision is not clear; write it as "
            "`model: {model: {path: PATH, revision: REVISION}}`"
        )
    if not path or (at and not revision):
        raise entry.value.place.error(
            f"{quote(text)} names no {'revision' if path else 'path'}; write PATH, or PATH@REVISION"
        )
    return ModelReference(text, path, revision if at else None, None, line=entry.value.place.line)


def _text(entry: Entry) -> str:
    item = entry.value
    if not isinstance(item, ScalarItem) or not isinstance(item.value, str):
        raise item.place.error(
            f"{entry.key!r} must be text, not {describe(item)}; write a path or a Hub name, in quotes when it "
            "looks like a number"
        )
    if not item.value.strip() or "\0" in item.value:
        raise item.place.error(f"{entry.key!r} is {quote(item.value)}, which is no path; name a model directory")
    return item.value


def _check_keys(table: TableItem, known: tuple[str, ...], what: str) -> None:
    for entry in table:
        if entry.key not in known:
            raise entry.place.error(f"{quote(entry.key)} is not a key of {what}; {suggestion(entry.key, known)}")


def locate(reference: ModelReference, origin: str, *directories: Path, kind: str = "model") -> Path:
    """Return the absolute path of the directory that holds ``reference``, whose adapter is not looked for.

    Local directories come first: relative to each of ``directories``, without any to the current one. What may be a
    name on the Hugging Face Hub is then looked for in the local cache, and downloaded where that is possible.
    Raises RecipeError, which calls it a ``kind`` and names each place that was tried.
    """
    reference = reference.without_adapter
    where = origin if reference.line is None else f"{origin}:{reference.line}"
    what = f"{where}: {kind} {quote(reference.text)}"
    tried: list[Path] = []
    # A directory whose name contains an @ is more likely meant than a revision that local directories do not have.
    for text in dict.fromkeys((reference.text, reference.path)):
        for candidate in _local_candidates(text, directories):
            if candidate in tried:
                continue
            tried.append(candidate)
            found = _kind(candidate, what)
            if found == "file":
                raise RecipeError(
                    f"{what} is the file {quote(str(candidate))}; name the directory that holds the {kind}"
                )
            if found == "directory" and text != reference.text:
                raise RecipeError(
                    f"{what} is the local directory {quote(str(candidate))}, which has no revisions; remove "
                    f"@{reference.revision}"
                )
            if found == "directory":
                return candidate
    places = " and ".join(quote(str(path)) for path in tried)
    if not is_hub_name(reference.path):
        raise RecipeError(f"{what} was not found at {places}; correct the path")
    try:
        return find_on_hub(reference.path, reference.revision)
    except DownloadError as error:
        raise RecipeError(
            f"{what} was not found at {places}, nor in the Hugging Face cache at {quote(str(hub_cache()))}; {error}"
        ) from error


def _local_candidates(text: str, directories: tuple[Path, ...]) -> Iterator[Path]:
    path = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises for unknown users
    if not directories:
        with suppress(FileNotFoundError):  # where the current directory was removed under us
            yield _absolute(path)
    for directory in directories:
        yield _absolute(os.path.join(directory, path))  # noqa: PTH118 - an absolute path stays as it is


def _kind(path: Path, what: str) -> Literal["directory", "file"] | None:
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise RecipeError(
            f"{what} cannot be looked for at {quote(str(path))} ({error.strerror}); make its directories accessible"
        ) from None
    except (OSError, ValueError):
        return None
    return "directory" if stat.S_ISDIR(mode) else "file"


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would replace symbolic links that the user chose
