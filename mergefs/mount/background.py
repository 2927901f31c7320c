"""What a mount does beside answering: gather statistics ahead of readers, and keep count of what was read."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from mergefs.catalog import Catalog
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.errors import MergefsError

_LOG = logging.getLogger(__name__)
_RECORDING_INTERVAL: Final = 5.0
"""Seconds by which `mergefs explain` may be behind what a mount has read."""


class Background:
    """Threads that end when the mount does."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def warm(self, models: Sequence[ModelFiles]) -> None:
        """Gather the statistics of every tensor of ``models``."""
        self._start("warm", lambda: _warm(models, self._ending))

    def record(self, models: Callable[[], Sequence[ModelFiles]], catalog: Catalog) -> None:
        """Keep what is read of every model in the catalog, now and then and at the end.

        ``models`` are asked for each time: those that have been shown.
        """
        self._start("record", lambda: _record(models, catalog, self._ending))

    def end(self) -> None:
        """End all of it and wait for that."""
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def _warm(models: Sequence[ModelFiles], ending: threading.Event) -> None:
    for model in models:
        for name in model.plan.tensors:
            if ending.is_set():
                return
            try:
                model.engine.prepare_tensor(name)
            except MergefsError as error:
                _LOG.warning("warming stopped: %s", error)
                return
    _LOG.info("statistics of all tensors are gathered")


def _record(models: Callable[[], Sequence[ModelFiles]], catalog: Catalog, ending: threading.Event) -> None:
    kept: dict[str, int] = {}
    over = False
    while not over:
        over = ending.wait(_RECORDING_INTERVAL)
        for model in models():
            # A mount that nobody reads writes nothing.
            if model.engine.tally.total() != kept.get(model.plan.plan_id, 0):
                kept[model.plan.plan_id] = keep_reading(model.engine, "mount", catalog)
