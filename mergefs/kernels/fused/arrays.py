"""Values in arrays, as formulas in numpy take them: loaded, rounded and stored by compiled loops, to the same bits."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import FUSED_DTYPES, types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.conversion import convert
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded, order_key, rounded
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.precision import load as load_plainly
from mergefs.kernels.precision import store as store_plainly

_NAN = np.float32(np.nan)
_LIKE: Final = {dtype: empty(0, dtype) for dtype in FUSED_DTYPES}


def _round(like: Any, single: Any, values: Any, results: Any) -> None:
    """Round the float32 at the address ``values``; ``single`` is an empty array for them, ``like`` for the dtype."""
    for i in range(np.uint64(results.size)):
        value = loaded(values, i, single)
        # The NaN of float32 may have ones where rounding to 16 bits would carry them out of the NaN.
        results[i] = rounded(value, like) if value == value else _NAN


def _order(like: Any, single: Any, values: Any, keys: Any) -> None:
    """Fill ``keys`` with the order keys of the float32 at the address ``values``, values of the dtype of ``like``."""
    for i in range(np.uint64(keys.size)):
        keys[i] = order_key(loaded(values, i, single), like)


def _signature(element: Any) -> Any:
    """Return the signature for the element type that stands for the dtype."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint32, 1, "C"),
        types.uint64,
        types.Array(types.float32, 1, "C"),
    )


def _signature_of_order(element: Any) -> Any:
    """Return the signature of ``_order`` for the element type that stands for the dtype."""
    keys = types.uint32 if element == types.uint32 else types.uint16
    return types.void(
        types.Array(element, 1, "C"), types.Array(types.uint32, 1, "C"), types.uint64, types.Array(keys, 1, "C")
    )


KERNEL: Final = Kernel(_round, _signature)
_ORDER: Final = Kernel(_order, _signature_of_order)
KERNELS: Final = (KERNEL, _ORDER)


class CompiledPrecision(Precision):
    """Rounds float32, and takes order keys of them, in one pass; everything else is as in ``Precision``."""

    __slots__ = ()

    def round(self, values: Array) -> Array:
        """Round ``values``, the exact or float32 results of an operation, to this precision."""
        if self.dtype.bits != 16 or values.dtype != np.float32 or not values.flags.c_contiguous or values.ndim == 0:
            return Precision.round(self, values)
        results: Array = np.empty(values.shape, dtype=np.float32)
        KERNEL.compiled(self.dtype)(_LIKE[self.dtype], _LIKE[F32], address(values), results.reshape(-1))
        return results

    def order_keys(self, values: Array) -> NDArray[np.unsignedinteger[Any]]:
        """Return unsigned integers that order as the values do; NaN, any of them, is above all."""
        if values.dtype != np.float32 or not values.flags.c_contiguous or values.ndim != 1:
            return Precision.order_keys(self, values)
        keys: NDArray[np.unsignedinteger[Any]] = np.empty(values.size, np.uint32 if self.dtype == F32 else np.uint16)
        _ORDER.compiled(self.dtype)(_LIKE[self.dtype], _LIKE[F32], address(values), keys)
        return keys


def precision_of(dtype: DType) -> Precision:
    """Return the fastest arithmetic in ``dtype``."""
    return CompiledPrecision(dtype) if dtype in FUSED_DTYPES else Precision(dtype)


def load(raw: Raw, stored: DType, compute: DType) -> Array:
    """Return what ``mergefs.kernels.precision.load`` does, but for the payload of NaN."""
    if stored not in FUSED_DTYPES or compute not in FUSED_DTYPES:
        return load_plainly(raw, stored, compute)
    values: Array = raw.view(np.float32) if stored == F32 else convert(raw, stored, F32).view(np.float32)
    return values if compute in (F32, stored) else precision_of(compute).round(values)


def store(values: Array, compute: DType, out: DType) -> Raw:
    """Return what ``mergefs.kernels.precision.store`` does, but for the payload of NaN."""
    if compute not in FUSED_DTYPES or out not in FUSED_DTYPES or values.dtype != np.float32:
        return store_plainly(values, compute, out)
    raw: Raw = np.ascontiguousarray(values).view(np.uint8)
    return raw if out == F32 else convert(raw, F32, out)
