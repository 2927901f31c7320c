"""How compiled kernels are called: each array as the numbers that numba's compiled functions take for one.

These are an owner and a parent, of which there are none here, the elements, the bytes of one of them, the address, and
the shape and the strides in bytes (numba, "Notes on numba's calling convention" and its model of arrays). The first two
arguments of all are where a result and an error would be left.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.memory import place_of

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_NUMBERS: Final[dict[types.Scalar, Any]] = {
    types.boolean: ctypes.c_bool,
    types.uint8: ctypes.c_uint8,
    types.int8: ctypes.c_int8,
    types.uint16: ctypes.c_uint16,
    types.int16: ctypes.c_int16,
    types.uint32: ctypes.c_uint32,
    types.int32: ctypes.c_int32,
    types.uint64: ctypes.c_uint64,
    types.int64: ctypes.c_int64,
    types.float32: ctypes.c_float,
    types.float64: ctypes.c_double,
}
_PYTHON: Final[dict[types.Scalar, Callable[[Any], Any]]] = {
    types.boolean: bool,
    types.float32: float,
    types.float64: float,
}
_RESULT: Final = ctypes.create_string_buffer(16)
"""Kernels write into it that they return nothing, all of them the same. It must live as long as they are called."""
_ADDRESS: Final = ctypes.addressof(_RESULT)


class CompiledKernel:
    """A kernel at an address, to be called with arguments of the types of its signature. Lets other threads go on."""

    def __init__(self, name: str, address: int, signature: types.Signature) -> None:
        self._name = name
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, _POINTER, _POINTER, *_types_of_numbers(signature))
        self._entry = prototype(address)
        self._takes = tuple(map(_taking, signature))

    def __call__(self, *arguments: Any) -> None:
        """Run the kernel. Raises TypeError for arguments of other types, before anything is written."""
        numbers: list[Any] = [_ADDRESS, _ADDRESS]
        try:
            for take, argument in zip(self._takes, arguments, strict=True):
                take(argument, numbers)
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                f"the kernel {self._name} was called with other arguments than it takes: {error}"
            ) from error
        status = self._entry(*numbers)
        if status:
            raise RuntimeError(f"the kernel {self._name} ended with status {status}")


def _types_of_numbers(signature: types.Signature) -> list[Any]:
    """Return the types of C of all numbers that arguments are handed over as."""
    found: list[Any] = []
    for one in signature:
        if isinstance(one, types.Scalar):
            found.append(_NUMBERS[one])
        else:
            found += [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, *(_SIZE,) * (2 * one.dimensions)]
    return found


def _taking(wanted: types.Type) -> Callable[[Any, list[Any]], None]:
    """Return what appends to a list the numbers that an argument is handed over as."""
    if isinstance(wanted, types.Scalar):
        return _taking_number(_PYTHON.get(wanted, int))
    return _taking_array(wanted.dtype, wanted.dimensions, wanted.readonly)


def _taking_number(python: Callable[[Any], Any]) -> Callable[[Any, list[Any]], None]:
    def take(number: Any, numbers: list[Any]) -> None:
        numbers.append(python(number))

    return take


def _taking_array(dtype: np.dtype[Any], dimensions: int, readonly: bool) -> Callable[[Any, list[Any]], None]:
    itemsize = dtype.itemsize

    def take(array: Any, numbers: list[Any]) -> None:
        flags = array.flags
        if array.ndim != dimensions or array.dtype != dtype or not flags.c_contiguous or not flags.aligned:
            raise TypeError(f"an array of {dimensions} dimensions of {dtype} is wanted, in one piece")
        if not (readonly or flags.writeable):
            raise TypeError("an array that must not be written to is not taken")
        numbers += (None, None, array.size, itemsize, place_of(array), *array.shape, *array.strides)

    return take
