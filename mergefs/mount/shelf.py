"""Recipes as they are now, each with the directory that shows its merged model or what is wrong with it."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs.checkpoint.source import Fingerprint
from mergefs.engine.model_files import ModelFiles
from mergefs.errors import MergefsError
from mergefs.mount.logs import summary
from mergefs.mount.recipe_files import recipes_at, unique_names
from mergefs.mount.shown import ErrorDirectory, ModelDirectory, ShownDirectory
from mergefs.planner.plan_ids import names_plan
from mergefs.recipe.variants import Variant, parse_variant

_LOG = logging.getLogger(__name__)

_RETIRED: Final = 16
"""Directories that nothing shows any more and that stay for readers who found them earlier, beside those in use."""

_VARIANTS: Final = 256
_REFUSAL_SECONDS: Final = 1.0
"""A variant that was refused is not tried again for so long: a shell asks several times for one name."""

_SEPARATOR: Final = "@"

PlanRecipe = Callable[[Path, Variant | None], ModelFiles]
"""Plans a recipe file, or a variant of it, without reading any tensor. Raises MergefsError."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a name stands for: the directory called ``target``, made from the file as ``fingerprint`` has it."""

    fingerprint: Fingerprint | None
    target: str


class Shelf:
    """The recipes in some files and directories, planned when they are asked for and again when they have changed.

    Safe to share between threads. ``in_use`` says of a directory whether a client holds a file of it open.
    """

    def __init__(self, recipes: Sequence[Path], plan: PlanRecipe, in_use: Callable[[ShownDirectory], bool]) -> None:
        self._recipes = tuple(recipes)
        self._plan = plan
        self._in_use = in_use
        self._files: dict[Path, tuple[Path, ...]] = {}
        self._unreadable: set[Path] = set()
        self._lock = threading.RLock()
        self._directories: OrderedDict[str, ShownDirectory] = OrderedDict()
        self._shown: dict[str, Shown] = {}
        self._variants: OrderedDict[str, Shown] = OrderedDict()
        self._refused: OrderedDict[str, tuple[Fingerprint | None, float]] = OrderedDict()

    def names(self) -> Mapping[str, Path]:
        """Return the recipe files that are there now, by the names that they are shown under.

        Of a directory that cannot be read they are those that were there when it could.
        """
        files = [file for path in self._recipes for file in self._files_at(path)]
        return dict(zip(unique_names(files), files, strict=True))

    def put(self, name: str, path: Path, files: ModelFiles) -> None:
        """Show what has been planned already."""
        with self._lock:
            self._shown[name] = Shown(_fingerprint(path), self._add(ModelDirectory(files)))

    def put_error(self, name: str, path: Path, error: Exception) -> None:
        """Show what is wrong with a recipe, and log it."""
        with self._lock:
            self._shown[name] = Shown(_fingerprint(path), self._add(_broken(name, path, error)))

    def target(self, name: str) -> str | None:
        """Return the name of the directory that ``name`` stands for now, or None; plan it when that is due.

        ``NAME@CHANGES`` is a variant of the recipe NAME. What is wrong with a recipe is shown, what is wrong with a
        variant is logged and shown to nobody.
        """
        path = self.names().get(name)
        if path is not None:
            return self._current(name, path)
        recipe, separator, changes = name.partition(_SEPARATOR)
        origin = self.names().get(recipe) if separator else None
        return None if origin is None else self._variant(name, origin, changes)

    def directory(self, target: str) -> ShownDirectory | None:
        """Return the directory called ``target``, or None."""
        return self._directories.get(target)

    def refresh(self) -> None:
        """Plan what has been added or edited, and forget what has been removed."""
        names = self.names()
        for name, path in names.items():
            self._current(name, path)
        with self._lock:
            for name in self._shown.keys() - names.keys():
                _LOG.info("%s has been removed", name)
                del self._shown[name]
            self._retire()

    def current(self) -> tuple[ShownDirectory, ...]:
        """Return the directories of all recipes, and of the variants that somebody has asked for, each once."""
        with self._lock:
            targets = [shown.target for shown in (*self._shown.values(), *self._variants.values())]
            return tuple(self._directories[target] for target in dict.fromkeys(targets))

    def directories(self) -> tuple[ShownDirectory, ...]:
        """Return every directory, also those that no name stands for any more."""
        with self._lock:
            return tuple(self._directories.values())

    def errors(self) -> Mapping[str, str]:
        """Return what is wrong with recipes, by name."""
        with self._lock:
            found = {name: self._directories[shown.target] for name, shown in self._shown.items()}
        return {name: one.sentence for name, one in found.items() if isinstance(one, ErrorDirectory)}

    def _files_at(self, path: Path) -> tuple[Path, ...]:
        """Return the recipe files that ``path`` stands for now; the id of a plan stands for itself."""
        if names_plan(path):
            return (path,)
        try:
            found = tuple(file for file in recipes_at(path) if file.exists())
        except OSError as error:
            if path not in self._unreadable:  # said once, and not several times a second
                self._unreadable.add(path)
                _LOG.warning("%s cannot be read: %s", path, error.strerror)
            return self._files.get(path, ())
        self._unreadable.discard(path)
        self._files[path] = found
        return found

    def _current(self, name: str, path: Path) -> str:
        """Return the directory of a recipe as its file is now."""
        fingerprint = _fingerprint(path)
        shown = self._shown.get(name)
        if shown is not None and shown.fingerprint == fingerprint:
            return shown.target
        with self._lock:
            fingerprint = _fingerprint(path)
            shown = self._shown.get(name)
            if shown is not None and shown.fingerprint == fingerprint:
                return shown.target
            directory: ShownDirectory
            try:
                directory = ModelDirectory(self._plan(path, None))
            except Exception as error:  # whatever it is, other recipes have nothing to do with it
                directory = _broken(name, path, error)
            else:
                _LOG.info("%s shows plan %s", name, directory.plan_id)
            self._shown[name] = Shown(fingerprint, self._add(directory))
            self._retire()
            return self._shown[name].target

    def _variant(self, name: str, path: Path, changes: str) -> str | None:
        """Return the directory of a variant, or None when there is no such variant."""
        fingerprint = _fingerprint(path)
        with self._lock:
            shown = self._variants.get(name)
            if shown is not None and shown.fingerprint == fingerprint:
                self._variants.move_to_end(name)
                return shown.target
            refused, until = self._refused.get(name, (None, 0.0))
            if refused == fingerprint and time.monotonic() < until:
                return None
            try:
                directory = ModelDirectory(self._plan(path, parse_variant(changes)))
            except MergefsError as error:
                _LOG.warning("there is no %s: %s", name, error)
                self._refused[name] = (fingerprint, time.monotonic() + _REFUSAL_SECONDS)
                if len(self._refused) > _VARIANTS:
                    self._refused.popitem(last=False)
                return None
            _LOG.info("%s shows plan %s", name, directory.plan_id)
            shown = self._variants[name] = Shown(fingerprint, self._add(directory))
            self._variants.move_to_end(name)
            if len(self._variants) > _VARIANTS:
                self._variants.popitem(last=False)
            self._retire()
            return shown.target

    def _add(self, directory: ShownDirectory) -> str:
        """Keep a directory, under the id of its plan where that is not taken by another text of the same recipe.

        A plan that is known by its contents has the same id when its files have been replaced by copies. The directory
        that reads those takes the place of the one that would go on to say that its files have changed.
        """
        if isinstance(directory, ModelDirectory):
            plan = directory.files.plan
            target = plan.plan_id
            known = self._directories.get(target)
            if isinstance(known, ModelDirectory) and known.files.plan.recipe.text != plan.recipe.text:
                target = f"{target}-{blake3(plan.recipe.text.encode()).hexdigest(length=4)}"
        else:
            target = f"error-{directory.attributes('').inode:x}"
        kept = self._directories.get(target)
        if kept is None or _read_files(kept) != _read_files(directory):
            self._directories[target] = directory
        self._directories.move_to_end(target)
        return target

    def _retire(self) -> None:
        """Forget the directories that nothing has shown for longest and that nobody uses."""
        shown = {one.target for one in (*self._shown.values(), *self._variants.values())}
        unused = [
            target
            for target, directory in self._directories.items()
            if target not in shown and not self._in_use(directory)
        ]
        for target in unused[: max(len(unused) - _RETIRED, 0)]:
            del self._directories[target]


def _read_files(directory: ShownDirectory) -> frozenset[tuple[Path, Fingerprint]]:
    """Return the files that a directory is read from, as they were when it was made."""
    return directory.files.read_files if isinstance(directory, ModelDirectory) else frozenset()


def _broken(name: str, path: Path, error: Exception) -> ErrorDirectory:
    """Log why a recipe cannot be planned and return the directory that says so."""
    if isinstance(error, MergefsError):
        sentence = str(error)
        _LOG.warning("%s is not shown: %s", name, sentence)
    else:
        sentence = (
            f"{path}: internal error while planning ({summary(error)}); this is a bug, and the log has the details"
        )
        _LOG.error("%s is not shown: %s", name, sentence, exc_info=error)
    return ErrorDirectory(sentence, time.time_ns())


def _fingerprint(path: Path) -> Fingerprint | None:
    """Return what the file system says of a recipe now, None when it is gone."""
    try:
        return Fingerprint.of(path.stat())
    except OSError:
        return None
