"""The tree of merged models that a mount shows: one model as the root, or a directory for each of several."""

import errno
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from mergefs.engine.model_files import ModelFiles
from mergefs.engine.resources import Resources
from mergefs.mount.tree import STATUS_ATTRIBUTE, Attributes

PLAN_ID_ATTRIBUTE = "user.mergefs.plan_id"


@dataclass(frozen=True, slots=True)
class MountedModel:
    """One merged model of a mount: the name of its directory and its files."""

    name: str
    files: ModelFiles


@dataclass(frozen=True, slots=True)
class _File:
    """A file of one model."""

    model: MountedModel
    name: str


class ModelTree:
    """A ``mergefs.mount.tree.Tree`` of merged models.

    With ``rooted`` there is exactly one model and the root is its directory; without, the root has one directory for
    each. ``on_close`` runs once everything has been released.
    """

    def __init__(
        self, models: Sequence[MountedModel], rooted: bool, resources: Resources, on_close: Callable[[], None]
    ) -> None:
        self._models = tuple(models)
        self._resources = resources
        self._on_close = on_close
        self._directories: dict[str, dict[str, None]] = {"/": {}}
        self._owners: dict[str, MountedModel] = {}
        self._files: dict[str, _File] = {}
        self._handles: dict[int, _File] = {}
        self._next_handle = 1
        self._lock = threading.Lock()
        for model in self._models:
            root = "/" if rooted else f"/{model.name}"
            self._add_directory(root)
            self._owners[root] = model
            for name in model.files.sizes:
                self._add_file(root.rstrip("/") + "/" + name, _File(model, name))

    @property
    def models(self) -> tuple[MountedModel, ...]:
        """The models that are shown."""
        return self._models

    @property
    def sources(self) -> tuple[Path, ...]:
        """The directories that bytes come from."""
        return tuple(dict.fromkeys(source.path for model in self._models for source in model.files.plan.sources))

    def _add_directory(self, path: str) -> None:
        """Add ``path`` and the directories above it."""
        while path not in self._directories:
            self._directories[path] = {}
            path, _, name = path.rpartition("/")
            path = path or "/"
            self._directories[path][name] = None

    def _add_file(self, path: str, file: _File) -> None:
        parent, _, name = path.rpartition("/")
        self._add_directory(parent or "/")
        self._directories[parent or "/"][name] = None
        self._files[path] = file

    def _model_of(self, path: str) -> MountedModel | None:
        """Return the model that ``path`` belongs to; the root of several models belongs to none."""
        file = self._files.get(path)
        if file is not None:
            return file.model
        while path not in self._owners:
            if path == "/":
                return None
            path = path.rpartition("/")[0] or "/"
        return self._owners[path]

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; FileNotFoundError when there is none."""
        file = self._files.get(path)
        if file is None and path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        model = self._model_of(path)
        created = (
            model.files.plan.created_ns if model else max((m.files.plan.created_ns for m in self._models), default=0)
        )
        size = file.model.files.sizes[file.name] if file else 0
        return Attributes(_inode(model, path), file is None, size, created)

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``."""
        if path in self._files:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        return tuple(self._directories[path])

    def open(self, path: str) -> int:
        """Check the sources of the file ``path`` and return a handle for it."""
        file = self._files.get(path)
        if file is None:
            if path in self._directories:
                raise IsADirectoryError(errno.EISDIR, "is a directory", path)
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        file.model.files.check(file.name)
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
            self._handles[handle] = file
        return handle

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""
        file = self._handles.get(handle)
        if file is None:
            raise OSError(errno.EBADF, "no such handle")
        return file.model.files.read(file.name, offset, size)

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""
        with self._lock:
            self._handles.pop(handle, None)

    def extended_attributes(self, path: str) -> Sequence[str]:
        """List the plan's id, where ``path`` belongs to one."""
        self.attributes(path)
        return (PLAN_ID_ATTRIBUTE,) if self._model_of(path) else ()

    def extended_attribute(self, path: str, name: str) -> bytes:
        """Return the plan's id, or at the root the status of the mount as JSON."""
        self.attributes(path)
        model = self._model_of(path)
        if name == PLAN_ID_ATTRIBUTE and model is not None:
            return model.files.plan.plan_id.encode()
        if name == STATUS_ATTRIBUTE and path == "/":
            return json.dumps(self.status()).encode()
        raise OSError(errno.ENODATA, "no such attribute", name)

    def status(self) -> Mapping[str, object]:
        """Return what ``mergefs status`` shows: counts of bytes and of look-ups."""
        plans = [model.files.plan for model in self._models]
        return {
            "recipes": [plan.recipe.origin for plan in plans],
            "plan_ids": [plan.plan_id for plan in plans],
            "expert_bytes_planned": sum(plan.outcome.expert_bytes_planned for plan in plans),
            "expert_bytes_total": sum(plan.outcome.expert_bytes_total for plan in plans),
            **asdict(self._resources.ledger.totals()),
            **asdict(self._resources.cache.totals()),
        }

    def total_size(self) -> int:
        """Return the bytes of all files."""
        return sum(size for model in self._models for size in model.files.sizes.values())

    def close(self) -> None:
        """Release everything."""
        self._on_close()


def _inode(model: MountedModel | None, path: str) -> int:
    """Return an inode number that is the same for the same plan and path, and another for another plan."""
    plan = model.files.plan.plan_id if model else ""
    number = int.from_bytes(blake3(f"{plan}\0{path}".encode()).digest(length=8), "little") >> 1
    return max(number, 2)


def unique_names(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return the name of each recipe's directory: the file's name without its suffix.

    Where two recipes would share a name, the suffix stays, and after that a number is added.
    """
    names: list[str] = []
    for path in paths:
        name = path.stem if path.stem not in names else path.name
        number = 2
        while name in names:
            name = f"{path.stem}-{number}"
            number += 1
        names.append(name)
    return tuple(names)
