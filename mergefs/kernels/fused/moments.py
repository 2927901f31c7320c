"""Norms of some inputs, and inner products of pairs of them: of what they add to a base, or of their directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, addresses, aligned_bytes, empty
from mergefs.kernels.fused.values import loaded, rounded
from mergefs.kernels.norms import LANES as NORM_LANES
from mergefs.kernels.precision import Raw
from mergefs.kernels.sums import LANES, TURN

TILE: Final = 1024
_PADDING: Final = 48
_EIGHT, _LANES, _TURN = np.uint64(NORM_LANES), np.uint64(LANES), np.uint64(TURN)
_ZERO = np.float32(0)


@inlined
def _fill(like: Any, addresses: Any, base: Any, based: Any, lengths: Any, first: Any, count: Any, rows: Any) -> Any:
    """Fill a row for each input with ``count`` elements of it, less the base, and divided by its length."""
    divided = lengths.size > 0
    for k in range(addresses.size):
        address, row = addresses[k], rows[k]
        length = lengths[k] if divided else _ZERO
        if based and divided:
            for i in range(count):
                delta = rounded(loaded(address, first + i, like) - loaded(base, first + i, like), like)
                row[i] = rounded(delta / length, like)
        elif based:
            for i in range(count):
                row[i] = rounded(loaded(address, first + i, like) - loaded(base, first + i, like), like)
        elif divided:
            for i in range(count):
                row[i] = rounded(loaded(address, first + i, like) / length, like)
        else:
            for i in range(count):
                row[i] = loaded(address, first + i, like)


@inlined
def _add_squares(row: Any, count: Any, lanes: Any) -> Any:
    """Add the squares of a row to eight lanes by turns."""
    # Each in a variable of its own, which the compiler makes one register of: in memory each turn waits for the last.
    lane0, lane1, lane2, lane3 = lanes[0], lanes[1], lanes[2], lanes[3]
    lane4, lane5, lane6, lane7 = lanes[4], lanes[5], lanes[6], lanes[7]
    for i in range(np.uint64(0), count, _EIGHT):
        lane0 += row[i] * row[i]
        lane1 += row[i + np.uint64(1)] * row[i + np.uint64(1)]
        lane2 += row[i + np.uint64(2)] * row[i + np.uint64(2)]
        lane3 += row[i + np.uint64(3)] * row[i + np.uint64(3)]
        lane4 += row[i + np.uint64(4)] * row[i + np.uint64(4)]
        lane5 += row[i + np.uint64(5)] * row[i + np.uint64(5)]
        lane6 += row[i + np.uint64(6)] * row[i + np.uint64(6)]
        lane7 += row[i + np.uint64(7)] * row[i + np.uint64(7)]
    lanes[0], lanes[1], lanes[2], lanes[3] = lane0, lane1, lane2, lane3
    lanes[4], lanes[5], lanes[6], lanes[7] = lane4, lane5, lane6, lane7


def _norms(like: Any, addresses: Any, base: Any, based: Any, lengths: Any, size: Any, lanes: Any, rows: Any) -> None:
    """Add the squares of each input to its eight ``lanes`` (float32); ``size`` is a multiple of eight."""
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _fill(like, addresses, base, based, lengths, first, count, rows)
        for k in range(addresses.size):
            _add_squares(rows[k], count, lanes[k])


def _sums(
    like: Any,
    addresses: Any,
    base: Any,
    based: Any,
    lengths: Any,
    size: Any,
    pairs: Any,
    exact: Any,
    lanes: Any,
    rows: Any,
) -> None:
    """Add the products of each of ``pairs`` to its ``lanes`` (float64), ``exact`` ones or rounded to the dtype."""
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _fill(like, addresses, base, based, lengths, first, count, rows)
        for pair in range(pairs.shape[0]):
            one, other, sums = rows[pairs[pair, 0]], rows[pairs[pair, 1]], lanes[pair]
            for chunk in range(np.uint64(0), count, _LANES):
                here = min(_LANES, count - chunk)
                if exact:
                    for i in range(here):
                        sums[i] += np.float64(one[chunk + i]) * np.float64(other[chunk + i])
                else:
                    for i in range(here):
                        sums[i] += np.float64(rounded(one[chunk + i] * other[chunk + i], like))


def _turns(
    like: Any,
    addresses: Any,
    base: Any,
    based: Any,
    lengths: Any,
    size: Any,
    pairs: Any,
    totals: Any,
    power: Any,
    before: Any,
    rows: Any,
) -> None:
    """Add the products of each of ``pairs`` to its ``totals`` (float32, a row for each level).

    ``size`` is a whole number of turns; ``power`` and ``before`` are as in ``mergefs.kernels.fused.turns``.
    """
    mask, levels = (np.int64(1) << power) - np.int64(1), totals.shape[1]
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _fill(like, addresses, base, based, lengths, first, count, rows)
        for pair in range(pairs.shape[0]):
            one, other, sums = rows[pairs[pair, 0]], rows[pairs[pair, 1]], totals[pair]
            lowest, done = sums[0], before + np.int64(first // _TURN)
            for turn in range(np.uint64(0), count, _TURN):
                for i in range(_TURN):
                    lowest[i] += rounded(one[turn + i] * other[turn + i], like)
                done += np.int64(1)
                if done & mask == 0:
                    for level in range(1, levels):
                        for i in range(_TURN):
                            sums[level, i] += sums[level - 1, i]
                            sums[level - 1, i] = _ZERO
                        if (done >> (np.int64(level) * power)) & mask:
                            break


def _inputs(element: Any) -> tuple[Any, ...]:
    """Return the types of what all three take first."""
    return (
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.uint64,
        types.boolean,
        types.Array(types.float32, 1, "C"),
        types.uint64,
    )


_ROWS = types.Array(types.float32, 2, "C")
_PAIRS = types.Array(types.int64, 2, "C")


def _signature(element: Any) -> Any:
    """Return the signature of ``_norms`` for one element type."""
    return types.void(*_inputs(element), _ROWS, _ROWS)


def _signature_of_sums(element: Any) -> Any:
    """Return the signature of ``_sums`` for one element type."""
    return types.void(*_inputs(element), _PAIRS, types.boolean, types.Array(types.float64, 2, "C"), _ROWS)


def _signature_of_turns(element: Any) -> Any:
    """Return the signature of ``_turns`` for one element type."""
    totals = types.Array(types.float32, 3, "C")
    return types.void(*_inputs(element), _PAIRS, totals, types.int64, types.int64, _ROWS)


KERNEL: Final = Kernel(_norms, _signature)
_SUMS: Final = Kernel(_sums, _signature_of_sums)
_TURNS: Final = Kernel(_turns, _signature_of_turns)
KERNELS: Final = (KERNEL, _SUMS, _TURNS)


@dataclass(frozen=True, slots=True)
class Moments:
    """Adds up what a run of elements gives; bytes of the inputs are of ``dtype``, the base's are the last if ``based``.

    ``lengths`` are what the inputs are divided by, ``pairs`` those whose products are added up.
    """

    dtype: DType
    based: bool
    lengths: NDArray[np.float32]
    pairs: NDArray[np.int64]

    def add_squares(self, raws: Sequence[Raw], lanes: NDArray[np.float32]) -> None:
        """Add the squares of each input to its row of eight lanes; the elements are a multiple of eight."""
        KERNEL.compiled(self.dtype)(*self._arguments(raws), lanes, self._rows(raws))

    def add_products(self, raws: Sequence[Raw], exact: bool, lanes: NDArray[np.float64]) -> None:
        """Add the products of each pair, ``exact`` or rounded, to its row of 128 lanes, of which the first is next."""
        _SUMS.compiled(self.dtype)(*self._arguments(raws), self.pairs, exact, lanes, self._rows(raws))

    def add_turns(self, raws: Sequence[Raw], totals: NDArray[np.float32], power: int, before: int) -> None:
        """Add the products of each pair to its levels; the elements are whole turns of 32."""
        arguments = self._arguments(raws)
        _TURNS.compiled(self.dtype)(*arguments, self.pairs, totals, np.int64(power), np.int64(before), self._rows(raws))

    def _arguments(self, raws: Sequence[Raw]) -> tuple[Any, ...]:
        base = address(raws[-1])
        size = np.uint64(raws[-1].size // self.dtype.itemsize)
        inputs = addresses(raws[:-1] if self.based else raws)
        return empty(0, self.dtype), inputs, base, self.based, self.lengths, size

    def _rows(self, raws: Sequence[Raw]) -> NDArray[np.float32]:
        columns = TILE + _PADDING
        return aligned_bytes(len(raws) * columns * 4).view(np.float32).reshape(len(raws), columns)
