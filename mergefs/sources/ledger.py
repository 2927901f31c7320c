"""The ledger: what was really read, and for what."""

import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Purpose(Enum):
    """Why bytes of a source are read."""

    EXPERT = "expert"  # paid for by the budget
    EXPERT_AGAIN = "expert again"  # bytes that were paid for before and that a cache has dropped since
    BASE = "base"
    ANALYSIS = "analysis"
    AUXILIARY = "auxiliary"  # tokenizer files and the like

    # There is one object of each, and every read looks up its account: by the name that would take a call of Python.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Bytes read by purpose, and bytes served to readers."""

    expert_bytes_read: int
    expert_bytes_reread: int
    base_bytes_read: int
    analysis_bytes_read: int
    auxiliary_bytes_read: int
    bytes_served: int


class _ThreadCounts(threading.local):
    """What one thread has read of experts: who asks before and after some work knows what that has cost."""

    first = 0
    again = 0


class Ledger:
    """Counts bytes; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = dict.fromkeys(Purpose, 0)
        self._served = 0
        self._analysed: Counter[Path] = Counter()
        self._thread = _ThreadCounts()

    def record_read(self, purpose: Purpose, size: int, path: Path) -> None:
        """Add ``size`` bytes that came from the file ``path``."""
        with self._lock:
            self._read[purpose] += size
            if purpose is Purpose.ANALYSIS:
                self._analysed[path] += size
        if purpose is Purpose.EXPERT:
            self._thread.first += size
        elif purpose is Purpose.EXPERT_AGAIN:
            self._thread.again += size

    def record_use(self, purpose: Purpose, size: int, path: Path) -> None:
        """Count ``size`` bytes that were read for analysis and held as read for ``purpose``, which uses them now."""
        with self._lock:
            self._read[Purpose.ANALYSIS] -= size
            self._analysed[path] -= size
        self.record_read(purpose, size, path)

    def of_this_thread(self) -> tuple[int, int]:
        """Return the bytes of experts that the calling thread has read so far, for the first time and again."""
        return self._thread.first, self._thread.again

    def analysed(self, path: Path) -> int:
        """Return the bytes of one file that were read for analysis."""
        with self._lock:
            return self._analysed[path]

    def record_served(self, size: int) -> None:
        """Add ``size`` bytes that a reader of the merged model was given."""
        with self._lock:
            self._served += size

    def totals(self) -> LedgerTotals:
        """Return all counts at one moment."""
        with self._lock:
            return LedgerTotals(
                expert_bytes_read=self._read[Purpose.EXPERT],
                expert_bytes_reread=self._read[Purpose.EXPERT_AGAIN],
                base_bytes_read=self._read[Purpose.BASE],
                analysis_bytes_read=self._read[Purpose.ANALYSIS],
                auxiliary_bytes_read=self._read[Purpose.AUXILIARY],
                bytes_served=self._served,
            )
