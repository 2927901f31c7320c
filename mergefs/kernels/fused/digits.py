"""Counts of the digits of order keys, those of one value of the bits above them."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F32
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel

_DIGIT_BITS = np.uint64(16)
_DIGIT = np.uint64(0xFFFF)


def _count(keys: Any, shift: Any, prefix: Any, counts: Any) -> None:
    """Add to ``counts`` those of the 16 bits from ``shift`` on of the keys whose higher bits are ``prefix``."""
    for i in range(np.uint64(keys.size)):
        shifted = np.uint64(keys[i]) >> shift
        if (shifted >> _DIGIT_BITS) == prefix:
            counts[shifted & _DIGIT] += 1


def _signature(element: Any) -> Any:
    """Return the signature for keys as wide as the element type that stands for a dtype."""
    keys = types.Array(types.uint32 if element == types.uint32 else types.uint16, 1, "C")
    return types.void(keys, types.uint64, types.uint64, types.Array(types.int64, 1, "C"))


KERNEL: Final = Kernel(_count, _signature)


def count_digits(keys: NDArray[Any], shift: int, prefix: int, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` (65,536 of them) those of ``keys``, of 16 or 32 bits, that have ``prefix`` above the digit."""
    writable = np.require(keys, requirements=("C", "W"))
    KERNEL.compiled(BF16 if keys.itemsize == 2 else F32)(writable, np.uint64(shift), np.uint64(prefix), counts)
