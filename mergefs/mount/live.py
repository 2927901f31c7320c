"""The tree of several recipes, as they are at the moment: edited, added and removed while they are mounted."""

import errno
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mergefs.engine.model_files import ModelFiles
from mergefs.engine.resources import Resources
from mergefs.mount.handles import Handles
from mergefs.mount.models import sources_of, status_of
from mergefs.mount.reading_ahead import ReadingAhead
from mergefs.mount.shelf import PlanRecipe, Shelf
from mergefs.mount.shown import ModelDirectory, ShownDirectory, inode_of
from mergefs.mount.tree import STATUS_ATTRIBUTE, Attributes
from mergefs.planner.plan_ids import PLAN_ID_ATTRIBUTE

PLANS: Final = ".plans"
"""The directory, which no listing shows, of the directories that names of recipes are links to."""

_REFRESH_SECONDS: Final = 0.3


class LiveTree:
    """A ``mergefs.mount.tree.Tree`` with a symbolic link for each recipe to the directory of its plan.

    An edited recipe is another plan and so another directory with other inodes: who reads the old one goes on. A
    recipe that cannot be planned is a directory with a file that says why. ``NAME@CHANGES`` is a variant of the recipe
    NAME; it is made when somebody looks it up and is not listed. What is computed ahead of readers, ``ahead`` decides.
    ``on_close`` runs once everything has been released.
    """

    def __init__(
        self,
        recipes: Sequence[Path],
        plan: PlanRecipe,
        resources: Resources,
        ahead: ReadingAhead,
        created_ns: int,
        on_close: Callable[[], None],
    ) -> None:
        self._handles = Handles(ahead)
        self.shelf = Shelf(recipes, plan, self._handles.in_use)
        self._resources = resources
        self._created_ns = created_ns
        self._on_close = on_close
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to look for changes by itself, so that what is new is planned before it is asked for."""
        self._watcher.start()

    @property
    def models(self) -> tuple[ModelFiles, ...]:
        """The models that are shown."""
        return tuple(one.files for one in self.shelf.current() if isinstance(one, ModelDirectory))

    @property
    def readable(self) -> tuple[ModelFiles, ...]:
        """The models that can be read: those that are shown, and those that earlier readers may still have."""
        return tuple(one.files for one in self.shelf.directories() if isinstance(one, ModelDirectory))

    @property
    def sources(self) -> tuple[Path, ...]:
        """The directories that bytes come from."""
        return sources_of(self.models)

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; FileNotFoundError when there is none."""
        if path in ("/", f"/{PLANS}"):
            return Attributes(inode_of("", path), True, 0, self._created_ns)
        found = self._find(path)
        if found is not None:
            return found[0].attributes(found[1])
        target = self._target(path)
        return Attributes(inode_of("", path), False, 0, self._created_ns, f"{PLANS}/{target}")

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``: at the root, one for each recipe."""
        if path == "/":
            return tuple(self.shelf.names())
        if path == f"/{PLANS}":
            return ()
        directory, below = self._directory(path)
        return directory.entries(below)

    def open(self, path: str) -> int:
        """Check the sources of the file ``path`` and return a handle for it."""
        return self._handles.open(*self._directory(path))

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""
        return self._handles.read(handle, offset, size)

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""
        self._handles.release(handle)

    def extended_attributes(self, path: str) -> Sequence[str]:
        """List the plan's id, where ``path`` belongs to one."""
        self.attributes(path)
        return () if self._plan_id(path) is None else (PLAN_ID_ATTRIBUTE,)

    def extended_attribute(self, path: str, name: str) -> bytes:
        """Return the plan's id, or at the root the status of the mount as JSON."""
        self.attributes(path)
        plan_id = self._plan_id(path)
        if name == PLAN_ID_ATTRIBUTE and plan_id is not None:
            return plan_id.encode()
        if name == STATUS_ATTRIBUTE and path == "/":
            return json.dumps({**status_of(self.models, self._resources), "errors": self.shelf.errors()}).encode()
        raise OSError(errno.ENODATA, "no such attribute", name)

    def total_size(self) -> int:
        """Return the bytes of all files."""
        return sum(directory.size for directory in self.shelf.current())

    def close(self) -> None:
        """Release everything."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._on_close()

    def _watch(self) -> None:
        """Look for changes until the tree is closed."""
        while not self._closing.wait(_REFRESH_SECONDS):
            self.shelf.refresh()

    def _find(self, path: str) -> tuple[ShownDirectory, str] | None:
        """Return the directory that ``path`` is in and the path below that; None where it is in the root."""
        first, _, rest = path[1:].partition("/")
        if first != PLANS or not rest:
            return None
        target, _, below = rest.partition("/")
        directory = self.shelf.directory(target)
        if directory is None:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        return directory, below

    def _directory(self, path: str) -> tuple[ShownDirectory, str]:
        """Return what ``_find`` does where ``path`` must not be an entry of the root."""
        found = self._find(path)
        if found is None:
            if self.attributes(path).is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory", path)
            raise NotADirectoryError(errno.ENOTDIR, "is a link", path)
        return found

    def _target(self, path: str) -> str:
        """Return the directory that an entry of the root stands for; FileNotFoundError when there is no such entry."""
        target = None if "/" in path[1:] else self.shelf.target(path[1:])
        if target is None:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        return target

    def _plan_id(self, path: str) -> str | None:
        """Return the id of the plan that ``path`` belongs to."""
        found = self._find(path)
        return None if found is None else found[0].plan_id
