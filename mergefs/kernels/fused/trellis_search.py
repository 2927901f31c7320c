"""Finds the best bits of a trellis plane: Viterbi's algorithm over all states of every element.

Only sums, products and comparisons of single elements are used, in one order: every CPU finds the same bits.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.trellis import STATE_BITS, STATES, STEP, stream_bytes

_HALF: Final = STATES // 2
_RUN: Final = 2048
"""Elements after which the best path so far is settled; its decisions take 128 bytes for each of them."""

_LEVEL: Final = 64
"""Elements after which costs are made small again, so that float32 tells them apart."""

_STEP: Final = np.float32(STEP)


def _search(
    stream: Any,
    sums: Any,
    targets: Any,
    ends: Any,
    scales: Any,
    book: Any,
    states: Any,
    decisions: Any,
    costs: Any,
    halves: Any,
) -> None:
    """Write the bits of one plane into ``stream``, which is zero, and add its values to ``sums`` (int32).

    ``targets`` (float32) are the deltas of the elements; those up to ``ends[i]`` are of a group of ``scales[i]``.
    ``states`` is uint8 of ``_RUN`` elements, ``decisions`` uint8 of ``_RUN`` rows of ``_HALF``,
    ``costs`` float32 of ``STATES`` and ``halves`` float32 of three rows of ``_HALF``: all of it is working memory.
    """
    size = np.uint64(targets.size)
    cheaper, low, high = halves[0], halves[1], halves[2]
    for j in range(STATES):
        costs[j] = np.float32(0)
    group, end, scale = 0, np.uint64(0), np.float32(0)
    first = np.uint64(0)
    while first < size:
        count = min(np.uint64(_RUN), size - first)
        for i in range(count):
            if first + i == end:
                scale, end = scales[group] * _STEP, np.uint64(ends[group])
                group += 1
                for j in range(_HALF):
                    low[j] = np.float32(book[j]) * scale
                    high[j] = np.float32(book[j + _HALF]) * scale
            missing, taken = targets[first + i] - np.float32(sums[first + i]) * scale, decisions[i]
            for j in range(_HALF):
                even, odd = costs[2 * j], costs[2 * j + 1]
                taken[j] = odd < even
                cheaper[j] = odd if odd < even else even
            for j in range(_HALF):
                miss = missing - low[j]
                costs[j] = cheaper[j] + miss * miss
            for j in range(_HALF):
                miss = missing - high[j]
                costs[j + _HALF] = cheaper[j] + miss * miss
            if i % np.uint64(_LEVEL) == np.uint64(0):
                least = costs[0]
                for j in range(STATES):
                    least = costs[j] if costs[j] < least else least
                for j in range(STATES):
                    costs[j] -= least
        best = 0
        for j in range(STATES):
            if costs[j] < costs[best]:
                best = j
        for j in range(STATES):
            costs[j] = np.float32(0) if j == best else np.float32(np.inf)
        state = best
        for back in range(count):
            i = count - np.uint64(1) - back
            states[i] = state
            state = 2 * (state & (_HALF - 1)) + np.int64(decisions[i, state & (_HALF - 1)])
        for i in range(count):
            place = first + i + np.uint64(STATE_BITS - 1)
            if first + i == np.uint64(0):
                stream[0] = states[0] & np.uint8(_HALF - 1)
            stream[place >> np.uint64(3)] |= np.uint8((states[i] >> np.uint8(STATE_BITS - 1)) << (place & np.uint64(7)))
            sums[first + i] += book[states[i]]
        first += count


def _signature() -> Any:
    """Return the signature."""
    octets, singles = types.Array(types.uint8, 1, "C"), types.Array(types.float32, 1, "C")
    return types.void(
        octets,
        types.Array(types.int32, 1, "C"),
        singles,
        types.Array(types.int64, 1, "C"),
        singles,
        types.Array(types.int16, 1, "C"),
        octets,
        types.Array(types.uint8, 2, "C"),
        singles,
        types.Array(types.float32, 2, "C"),
    )


KERNEL: Final = Kernel(_search, _signature)


class Search:
    """Finds planes one after the other for elements that have them; it is for one thread at a time."""

    def __init__(self) -> None:
        self._states: NDArray[np.uint8] = np.empty(_RUN, dtype=np.uint8)
        self._decisions: NDArray[np.uint8] = np.empty((_RUN, _HALF), dtype=np.uint8)
        self._costs: NDArray[np.float32] = np.empty(STATES, dtype=np.float32)
        self._halves: NDArray[np.float32] = np.empty((3, _HALF), dtype=np.float32)

    def plane(
        self,
        targets: NDArray[np.float32],
        sums: NDArray[np.int32],
        ends: NDArray[np.int64],
        scales: NDArray[np.float32],
        book: NDArray[np.int16],
    ) -> NDArray[np.uint8]:
        """Return the bits of the next plane and add its values to ``sums``, those of the planes before.

        ``targets`` are the deltas; the groups of ``scales`` end before the elements ``ends``. Both should be multiplied
        by a power of two that makes the largest scale about one.
        """
        stream: NDArray[np.uint8] = np.zeros(stream_bytes(targets.size), dtype=np.uint8)
        working = self._states, self._decisions, self._costs, self._halves
        KERNEL.compiled()(stream, sums, targets, ends, scales, book, *working)
        return stream
