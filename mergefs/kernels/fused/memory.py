"""How blocks of bytes are handed to kernels."""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.kernels.precision import Raw

_STORAGE: Final[dict[DType, type[np.uint16] | type[np.int16] | type[np.uint32]]] = {
    BF16: np.uint16,
    F16: np.int16,
    F32: np.uint32,
}

_CACHE_LINE: Final = 64
_NOTHING: Final = {dtype.name: np.empty(0, dtype=storage) for dtype, storage in _STORAGE.items()}


def place_of(raw: NDArray[Any]) -> int:
    """Return where the elements of ``raw`` lie: in one piece, aligned or not. It is the caller who keeps them alive."""
    flags = raw.flags
    if not flags.c_contiguous:
        raise ValueError("a kernel was given bytes that do not lie in one piece")
    if flags.writeable and raw.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(raw.data))  # in half the time that numpy takes to tell
    return int(raw.ctypes.data)


def address(raw: NDArray[Any]) -> np.uint64:
    """Return ``place_of`` as a number of the very type that signatures have."""
    found: np.uint64 = np.uint64(place_of(raw))
    return found


def addresses(raws: Sequence[Raw]) -> NDArray[np.uint64]:
    """Return ``place_of`` each."""
    return np.array([place_of(raw) for raw in raws], dtype=np.uint64)


def aligned_bytes(size: int) -> Raw:
    """Return ``size`` bytes that begin with a cache line, so that no access of a vector straddles two of them."""
    room: Raw = np.empty(size + _CACHE_LINE, dtype=np.uint8)
    skipped = -place_of(room) % _CACHE_LINE
    return room[skipped : skipped + size]


def empty(count: int, dtype: DType) -> NDArray[Any]:
    """Return an array of ``count`` elements of the integer type that stands for ``dtype``."""
    if not count:
        return _NOTHING[dtype.name]
    return view(aligned_bytes(count * dtype.itemsize), dtype)


def view(raw: Raw, dtype: DType) -> NDArray[Any]:
    """Return aligned bytes as an array of the integer type that stands for ``dtype``."""
    return raw.view(_STORAGE[dtype])


def empty_result(raw: Raw, dtype: DType, into: Raw | None = None) -> NDArray[Any]:
    """Return an array for as many elements as ``raw`` holds, of the integer type that stands for ``dtype``.

    It lies in ``into``, which has as many bytes, where one is given and numbers of that type can begin there.
    """
    if into is not None and place_of(into) % dtype.itemsize == 0:
        return view(into, dtype)
    return empty(raw.size // dtype.itemsize, dtype)
