"""Progress on stderr, where that is a terminal and the work is longer than a moment."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergefs.progress import Progress, Silence

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class _Bar:
    """Shows each stage as a bar with rate and time left."""

    def __init__(self, display: "RichProgress") -> None:
        self._display = display
        self._task: int | None = None

    def start(self, title: str, total: int) -> None:
        """Add a bar."""
        self.finish()
        self._task = int(self._display.add_task(title, total=total))

    def advance(self, size: int) -> None:
        """Move the bar on."""
        if self._task is not None:
            self._display.advance(self._task, size)  # type: ignore[arg-type]  # rich's TaskID is an int

    def finish(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._display.remove_task(self._task)  # type: ignore[arg-type]  # rich's TaskID is an int
            self._task = None


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Lend a progress display on stderr, or silence where nobody would see it, or wants to."""
    if quiet or not sys.stderr.isatty():
        yield Silence()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as display:
        yield _Bar(display)
