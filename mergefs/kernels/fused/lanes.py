"""Sums in float64 in 128 lanes, of values that lie in arrays: what ``mergefs.kernels.sums.LaneSums`` adds up."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded
from mergefs.kernels.sums import LANES

_TURN = np.uint64(LANES)
_LIKE: Final = empty(0, F32)


def _add_singles(like: Any, values: Any, size: Any, lanes: Any, filled: Any) -> None:
    """Add ``size`` float32 at the address ``values`` to the lanes, the first of them to the lane ``filled``."""
    head = min((_TURN - filled) % _TURN, size)
    for i in range(head):
        lanes[filled + i] += np.float64(loaded(values, i, like))
    whole = head + (size - head) // _TURN * _TURN
    for first in range(head, whole, _TURN):
        for i in range(_TURN):
            lanes[i] += np.float64(loaded(values, first + i, like))
    for i in range(whole, size):
        lanes[i - whole] += np.float64(loaded(values, i, like))


def _add_doubles(like: Any, values: Any, lanes: Any, filled: Any) -> None:
    """Add float64 ``values`` to the lanes, the first of them to the lane ``filled``."""
    size = np.uint64(values.size)
    head = min((_TURN - filled) % _TURN, size)
    for i in range(head):
        lanes[filled + i] += values[i]
    whole = head + (size - head) // _TURN * _TURN
    for first in range(head, whole, _TURN):
        for i in range(_TURN):
            lanes[i] += values[first + i]
    for i in range(whole, size):
        lanes[i - whole] += values[i]


def _signature(element: Any) -> Any:
    """Return the signature for float32."""
    return types.void(
        types.Array(element, 1, "C"), types.uint64, types.uint64, types.Array(types.float64, 1, "C"), types.uint64
    )


def _signature_of_doubles(element: Any) -> Any:
    """Return the signature for float64."""
    doubles = types.Array(types.float64, 1, "C")
    return types.void(types.Array(element, 1, "C"), doubles, doubles, types.uint64)


KERNEL: Final = Kernel(_add_singles, _signature)
_DOUBLES: Final = Kernel(_add_doubles, _signature_of_doubles)
KERNELS: Final = (KERNEL, _DOUBLES)


def add_to_lanes(lanes: NDArray[np.float64], values: NDArray[Any], filled: int) -> None:
    """Add ``values``, float32 or float64, to ``lanes`` by turns, the first of them to the lane ``filled``."""
    if values.dtype == np.float32:
        values = np.ascontiguousarray(values)
        KERNEL.compiled(F32)(_LIKE, address(values), np.uint64(values.size), lanes, np.uint64(filled))
    else:
        doubles = np.require(values, np.float64, ("C", "W"))
        _DOUBLES.compiled(F32)(_LIKE, doubles, lanes, np.uint64(filled))
