"""The tree of one merged model, which a mount shows as its root; and what a mount says of the models that it shows."""

import errno
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mergefs.engine.model_files import ModelFiles
from mergefs.engine.resources import Resources
from mergefs.mount.handles import Handles
from mergefs.mount.reading_ahead import ReadingAhead
from mergefs.mount.shown import ModelDirectory
from mergefs.mount.tree import STATUS_ATTRIBUTE, Attributes
from mergefs.planner.plan_ids import PLAN_ID_ATTRIBUTE


class ModelTree:
    """A ``mergefs.mount.tree.Tree`` whose root is the directory of one model.

    What is computed ahead of readers, ``ahead`` decides. ``on_close`` runs once everything has been released.
    """

    def __init__(
        self, files: ModelFiles, resources: Resources, ahead: ReadingAhead, on_close: Callable[[], None]
    ) -> None:
        self._directory = ModelDirectory(files)
        self._resources = resources
        self._on_close = on_close
        self._handles = Handles(ahead)

    @property
    def models(self) -> tuple[ModelFiles, ...]:
        """The model that is shown."""
        return (self._directory.files,)

    @property
    def readable(self) -> tuple[ModelFiles, ...]:
        """The models that can be read: the same one."""
        return self.models

    @property
    def sources(self) -> tuple[Path, ...]:
        """The directories that bytes come from."""
        return sources_of(self.models)

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; FileNotFoundError when there is none."""
        return self._directory.attributes(path[1:])

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``."""
        return self._directory.entries(path[1:])

    def open(self, path: str) -> int:
        """Check the sources of the file ``path`` and return a handle for it."""
        return self._handles.open(self._directory, path[1:])

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""
        return self._handles.read(handle, offset, size)

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""
        self._handles.release(handle)

    def extended_attributes(self, path: str) -> Sequence[str]:
        """List the plan's id."""
        self.attributes(path)
        return (PLAN_ID_ATTRIBUTE,)

    def extended_attribute(self, path: str, name: str) -> bytes:
        """Return the plan's id, or at the root the status of the mount as JSON."""
        self.attributes(path)
        if name == PLAN_ID_ATTRIBUTE:
            return self._directory.files.plan.plan_id.encode()
        if name == STATUS_ATTRIBUTE and path == "/":
            return json.dumps(self.status()).encode()
        raise OSError(errno.ENODATA, "no such attribute", name)

    def status(self) -> Mapping[str, object]:
        """Return what ``mergefs status`` shows."""
        return status_of(self.models, self._resources)

    def total_size(self) -> int:
        """Return the bytes of all files."""
        return self._directory.size

    def close(self) -> None:
        """Release everything."""
        self._on_close()


def sources_of(models: Iterable[ModelFiles]) -> tuple[Path, ...]:
    """Return the directories that the bytes of models come from, each once."""
    return tuple(dict.fromkeys(source.path for model in models for source in model.plan.sources))


def status_of(models: Sequence[ModelFiles], resources: Resources) -> Mapping[str, object]:
    """Return what ``mergefs status`` shows of models: counts of bytes and of look-ups."""
    plans = [model.plan for model in models]
    return {
        "recipes": [plan.recipe.origin for plan in plans],
        "plan_ids": [plan.plan_id for plan in plans],
        "expert_bytes_planned": sum(plan.outcome.expert_bytes_planned for plan in plans),
        "expert_bytes_total": sum(plan.outcome.expert_bytes_total for plan in plans),
        **asdict(resources.ledger.totals()),
        **asdict(resources.cache.totals()),
    }
