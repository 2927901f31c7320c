"""Blocks from one dtype to another."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty, view
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw

_NAN = np.float32(np.nan)


def _convert(result: Any, like: Any, source: Any) -> None:
    """Convert the elements at the address ``source``; ``like`` is an empty array for their dtype."""
    for i in range(np.uint64(result.size)):
        value = loaded(source, i, like)
        # The NaN of float32 may have ones where rounding to 16 bits would carry them out of the NaN.
        value = value if value == value else _NAN
        result[i] = narrowed(rounded(value, result), result)


def _signature(target: Any, stored: Any) -> Any:
    """Return the signature for the element types of the result and of the source."""
    return types.void(types.Array(target, 1, "C"), types.Array(stored, 1, "C"), types.uint64)


KERNEL: Final = Kernel(_convert, _signature)


def convert(raw: Raw, stored: DType, wanted: DType, buffer: Raw | None = None) -> Raw:
    """Return ``raw``, elements of ``stored``, rounded to ``wanted``; both have fused kernels. NaN is canonical.

    The result lies at the beginning of ``buffer`` where one is given: aligned bytes, enough of them.
    """
    count = raw.size // stored.itemsize
    result = empty(count, wanted) if buffer is None else view(buffer[: count * wanted.itemsize], wanted)
    KERNEL.compiled(wanted, stored)(result, empty(0, stored), address(raw))
    converted: Raw = result.view(np.uint8)
    return converted
