"""What was really read of each input of each tensor."""

import threading
from collections.abc import Mapping
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.plan import TensorPlan
from mergefs.sources.ledger import Ledger


class Tally:
    """Counts bytes of experts for the tensors of one plan. Safe to share between threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._counts: dict[str, list[list[int]]] = {}

    def charge(self, tensor: TensorPlan, index: int) -> "_Charge":
        """Count what this thread reads meanwhile for the input at ``index``; one after the last is the stand-in.

        What is returned is a context, and the time of reading is when it is entered.
        """
        return _Charge(self, self._ledger, tensor, index)

    def counts(self) -> Mapping[str, NDArray[np.int64]]:
        """Return for each tensor of which anything was read a copy of its counts: (inputs + 1) x (first, again)."""
        with self._lock:
            return {name: np.array(counts, dtype=np.int64) for name, counts in self._counts.items()}

    def total(self) -> int:
        """Return how many bytes were read, again or not."""
        with self._lock:
            return sum(first + again for counts in self._counts.values() for first, again in counts)

    def add(self, tensor: TensorPlan, index: int, first: int, again: int) -> None:
        """Count bytes that were read for the input at ``index``."""
        with self._lock:
            counts = self._counts.get(tensor.name)
            if counts is None:
                counts = self._counts[tensor.name] = [[0, 0] for _ in range(len(tensor.places) + 1)]
            count = counts[index]
            count[0] += first
            count[1] += again


class _Charge:
    """A context. Every input of every block enters one: a generator would take more than twice as long."""

    __slots__ = ("_before", "_index", "_ledger", "_tally", "_tensor")

    def __init__(self, tally: Tally, ledger: Ledger, tensor: TensorPlan, index: int) -> None:
        self._tally = tally
        self._ledger = ledger
        self._tensor = tensor
        self._index = index

    def __enter__(self) -> None:
        self._before = self._ledger.of_this_thread()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        (first, again), (first_now, again_now) = self._before, self._ledger.of_this_thread()
        if first != first_now or again != again_now:
            self._tally.add(self._tensor, self._index, first_now - first, again_now - again)
