"""Sums in float32 on levels, of values that lie in arrays: what ``mergefs.kernels.sums.PartialSums`` adds up."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded
from mergefs.kernels.sums import TURN

_LIKE: Final = empty(0, F32)
_TURN = np.uint64(TURN)
_ZERO = np.float32(0)


def _add_turns(like: Any, values: Any, turns: Any, totals: Any, power: Any, before: Any) -> None:
    """Add ``turns`` turns at the address ``values`` to ``totals`` (float32, a row for each level).

    ``power`` is the power of two that the turns of a step are, ``before`` of them have been added already.
    """
    lowest, mask = totals[0], (np.int64(1) << power) - np.int64(1)
    for turn in range(turns):
        first = np.uint64(turn) * _TURN
        for i in range(_TURN):
            lowest[i] += loaded(values, first + i, like)
        done = before + np.int64(turn) + np.int64(1)
        if done & mask == 0:
            for level in range(1, totals.shape[0]):
                for i in range(_TURN):
                    totals[level, i] += totals[level - 1, i]
                    totals[level - 1, i] = _ZERO
                if (done >> (np.int64(level) * power)) & mask:
                    break


def _signature(element: Any) -> Any:
    """Return the signature for float32."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.Array(types.float32, 2, "C"),
        types.int64,
        types.int64,
    )


KERNEL: Final = Kernel(_add_turns, _signature)


def add_turns(totals: NDArray[np.float32], values: NDArray[np.float32], power: int, before: int) -> None:
    """Add ``values``, whole turns, to ``totals``, which has a row of a turn for each level."""
    values = np.ascontiguousarray(values)
    turns = np.uint64(values.size // TURN)
    KERNEL.compiled(F32)(_LIKE, address(values), turns, totals, np.int64(power), np.int64(before))
