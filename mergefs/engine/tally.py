"""What was really read of each input of each tensor."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.plan import TensorPlan
from mergefs.sources.ledger import Ledger


class Tally:
    """Counts bytes of experts for the tensors of one plan. Safe to share between threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._counts: dict[str, NDArray[np.int64]] = {}

    @contextmanager
    def charge(self, tensor: TensorPlan, index: int) -> Iterator[None]:
        """Count what this thread reads meanwhile for the input at ``index``; one after the last is the stand-in."""
        before = self._ledger.of_this_thread()
        try:
            yield
        finally:
            after = self._ledger.of_this_thread()
            if after != before:
                self._add(tensor, index, after[0] - before[0], after[1] - before[1])

    def counts(self) -> Mapping[str, NDArray[np.int64]]:
        """Return for each tensor of which anything was read a copy of its counts: (inputs + 1) x (first, again)."""
        with self._lock:
            return {name: counts.copy() for name, counts in self._counts.items()}

    def total(self) -> int:
        """Return how many bytes were read, again or not."""
        with self._lock:
            return int(sum(counts.sum() for counts in self._counts.values()))

    def _add(self, tensor: TensorPlan, index: int, first: int, again: int) -> None:
        with self._lock:
            counts = self._counts.get(tensor.name)
            if counts is None:
                counts = self._counts[tensor.name] = np.zeros((len(tensor.places) + 1, 2), dtype=np.int64)
            counts[index] += (first, again)
