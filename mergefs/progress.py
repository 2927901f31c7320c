"""How long work says how far it is, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Told of the stages of a piece of work."""

    def start(self, title: str, total: int) -> None:
        """A stage begins; ``total`` is in bytes."""

    def advance(self, size: int) -> None:
        """``size`` more bytes of the stage are done."""

    def finish(self) -> None:
        """The stage is over."""


class Silence:
    """Listens to nothing."""

    def start(self, title: str, total: int) -> None:
        """Ignore the beginning of a stage."""

    def advance(self, size: int) -> None:
        """Ignore the step."""

    def finish(self) -> None:
        """Ignore the end of a stage."""
