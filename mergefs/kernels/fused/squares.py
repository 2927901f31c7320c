"""Squares of float32 in eight lanes, of values that lie in arrays: what ``mergefs.kernels.norms`` adds up."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded

_LIKE: Final = empty(0, F32)
_TURN = np.uint64(8)


def _add_squares(like: Any, values: Any, size: Any, lanes: Any) -> None:
    """Add the squares of ``size`` float32 at the address ``values``, a multiple of eight, to eight lanes by turns."""
    # Each in a variable of its own, which the compiler makes one register of: in memory each turn waits for the last.
    lane0, lane1, lane2, lane3 = lanes[0], lanes[1], lanes[2], lanes[3]
    lane4, lane5, lane6, lane7 = lanes[4], lanes[5], lanes[6], lanes[7]
    for i in range(np.uint64(0), size, _TURN):
        value0, value1 = loaded(values, i, like), loaded(values, i + np.uint64(1), like)
        value2, value3 = loaded(values, i + np.uint64(2), like), loaded(values, i + np.uint64(3), like)
        value4, value5 = loaded(values, i + np.uint64(4), like), loaded(values, i + np.uint64(5), like)
        value6, value7 = loaded(values, i + np.uint64(6), like), loaded(values, i + np.uint64(7), like)
        lane0 += value0 * value0
        lane1 += value1 * value1
        lane2 += value2 * value2
        lane3 += value3 * value3
        lane4 += value4 * value4
        lane5 += value5 * value5
        lane6 += value6 * value6
        lane7 += value7 * value7
    lanes[0], lanes[1], lanes[2], lanes[3] = lane0, lane1, lane2, lane3
    lanes[4], lanes[5], lanes[6], lanes[7] = lane4, lane5, lane6, lane7


def _signature(element: Any) -> Any:
    """Return the signature for float32."""
    return types.void(types.Array(element, 1, "C"), types.uint64, types.uint64, types.Array(types.float32, 1, "C"))


KERNEL: Final = Kernel(_add_squares, _signature)


def add_squares(lanes: NDArray[np.float32], values: NDArray[np.float32]) -> None:
    """Add the squares of ``values``, whose number is a multiple of eight, to eight ``lanes`` by turns."""
    values = np.ascontiguousarray(values)
    KERNEL.compiled(F32)(_LIKE, address(values), np.uint64(values.size), lanes)
