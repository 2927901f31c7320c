"""Values of BF16, F16, F32 and F64 in numpy, rounded after every operation as torch rounds them.

numpy has no bfloat16, so values of the 16 bit types are carried in float32, where each of them is exact. An operation
on 16 bit types is the float32 operation rounded once, which is what torch does on every CPU.
"""

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType

Array: TypeAlias = NDArray[np.floating[Any]]
Raw: TypeAlias = NDArray[np.uint8]


_PATTERNS: Final[dict[str, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]]] = {
    BF16.name: (np.int16, np.uint16, 0x7F80),
    F16.name: (np.int16, np.uint16, 0x7C00),
    F32.name: (np.int32, np.uint32, 0x7F800000),
    F64.name: (np.int64, np.uint64, 0x7FF0000000000000),
}
"""The integers, with and without a sign, that the bits of a dtype are; and the bits of its infinity."""


def round_to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 values to the nearest BF16, ties to even, and return the bit patterns. NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = np.uint32(0x7FC0)
    narrowed: NDArray[np.uint16] = rounded.astype(np.uint16)
    return narrowed


def widen_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of BF16 bit patterns."""
    values: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic in one compute dtype."""

    dtype: DType

    @property
    def carrier(self) -> type[np.float32] | type[np.float64]:
        """The numpy type that values of this precision are carried in."""
        return np.float64 if self.dtype == F64 else np.float32

    def round(self, values: Array) -> Array:
        """Round ``values``, the exact or float32 results of an operation, to this precision."""
        if self.dtype == BF16:
            return widen_bfloat16_bits(round_to_bfloat16_bits(np.ascontiguousarray(values, dtype=np.float32)))
        if self.dtype == F16:
            return values.astype(np.float16).astype(np.float32)
        return values

    def scalar(self, value: float) -> np.float32 | np.float64:
        """Return a Python number as torch turns one into a tensor of this dtype: one that is too large as infinity."""
        with np.errstate(over="ignore"):
            array: Array = np.array([value], dtype=self.carrier)
            rounded: np.float32 | np.float64 = self.round(array)[0]
        return rounded

    def magnitude_keys(self, values: Array) -> NDArray[np.uint32]:
        """Return the bit patterns of the magnitudes, which order as the magnitudes do (NaN above infinity).

        Of the 16 bit patterns for the 16 bit types, of the float32 values for the others.
        """
        keys: NDArray[np.uint32]
        if self.dtype == F16:
            keys = (values.astype(np.float16).view(np.uint16) & np.uint16(0x7FFF)).astype(np.uint32)
            return keys
        keys = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
        return keys >> np.uint32(16) if self.dtype == BF16 else keys

    def order_keys(self, values: Array) -> NDArray[np.unsignedinteger[Any]]:
        """Return unsigned integers of ``order_bits`` bits that order as the values do; NaN, any of them, is above all.

        Both zeros have the same key.
        """
        bits = self.order_bits
        width = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
        sign = width(1 << (bits - 1))
        number = np.float16 if self.dtype == F16 else self.carrier
        patterns = np.ascontiguousarray(values + self.carrier(0), dtype=number).view(f"u{np.dtype(number).itemsize}")
        if self.dtype == BF16:
            patterns = (patterns >> np.uint32(16)).astype(np.uint16)
        keys: NDArray[np.unsignedinteger[Any]] = np.where(patterns & sign, ~patterns, patterns | sign)
        keys[np.isnan(values)] = np.iinfo(width).max
        return keys

    def of_order_key(self, key: int) -> float:
        """Return the value that has ``key`` among the ``order_keys``."""
        bits = self.order_bits
        sign = 1 << (bits - 1)
        pattern = key - sign if key & sign else (1 << bits) - 1 - key
        if self.dtype == BF16:
            pattern <<= 16
        number = {16: (np.uint16, np.float16), 32: (np.uint32, np.float32), 64: (np.uint64, np.float64)}
        width, kind = number[32 if self.dtype == BF16 else bits]
        return float(np.array([pattern], dtype=width).view(kind)[0])

    @property
    def order_bits(self) -> int:
        """How many bits an order key has: 16, 32 or 64."""
        return self.dtype.bits

    @property
    def key_bits(self) -> int:
        """How many bits a magnitude key has: 15 or 31."""
        return 15 if self.dtype.bits == 16 else 31


def load(raw: Raw, stored: DType, compute: DType) -> Array:
    """Return the elements of ``raw``, bytes of dtype ``stored``, as values of ``compute`` in its carrier type."""
    values: Array
    if stored == BF16:
        values = widen_bfloat16_bits(raw.view(np.uint16))
    elif stored == F16:
        values = raw.view(np.float16).astype(np.float32)
    else:
        values = raw.view(np.float32 if stored == F32 else np.float64)
    return _convert(values, stored, compute)


def store(values: Array, compute: DType, out: DType) -> Raw:
    """Return ``values`` of ``compute`` as bytes of dtype ``out``."""
    converted = _convert(values, compute, out)
    if out == BF16:
        bits = np.ascontiguousarray(converted, dtype=np.float32).view(np.uint32) >> np.uint32(16)
        raw: Raw = bits.astype(np.uint16).view(np.uint8)
    elif out == F16:
        raw = converted.astype(np.float16).view(np.uint8)
    else:
        raw = np.ascontiguousarray(converted).view(np.uint8)
    return raw


def is_finite(raw: Raw, dtype: DType) -> bool:
    """Return whether ``raw`` holds neither NaN nor infinity: whether no exponent has all bits set.

    Bits order as magnitudes do, the positive ones as signed integers and the negative ones as unsigned: so the largest
    of each tells, and that is found as fast as memory is read, with nothing put down on the way.
    """
    signed, unsigned, infinity = _PATTERNS[dtype.name]
    positive, negative = raw.view(signed), raw.view(unsigned)
    sign = 1 << (dtype.bits - 1)
    return not positive.size or bool(positive.max() < infinity and negative.max() < infinity + sign)


def _convert(values: Array, source: DType, target: DType) -> Array:
    """Round ``values`` of dtype ``source`` to ``target`` and move them into its carrier (F64 goes by float32)."""
    if source == target:
        return values
    if target == F64:
        return values.astype(np.float64)
    narrowed = values.astype(np.float32) if values.dtype != np.float32 else values
    if target == F32 or (target, source) in ((BF16, BF16), (F16, F16)):
        return narrowed
    return Precision(target).round(narrowed)
