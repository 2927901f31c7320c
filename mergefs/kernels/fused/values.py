"""Loading, rounding and storing of single elements: what kernels are written in.

Values are carried in float32, as by ``mergefs.kernels.precision``. The precision is chosen by type, when a kernel is
compiled: each instruction takes ``like``, an array of the element type that stands for the dtype (``ELEMENTS``).

A NaN is never treated apart while computing: the NaN of the 16 bit types, and those that the CPU makes, have zeros in
the bits that rounding looks at, so they stay NaN. Only ``narrowed`` gives every NaN the same bits.
"""

from typing import Any, Final

from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.marks import instruction

ELEMENTS: Final[dict[DType, types.Scalar]] = {BF16: types.uint16, F16: types.int16, F32: types.uint32}
"""The integer types, which the compiler tells apart, that stand for the dtypes in the signatures of kernels."""


@instruction
def loaded(address: Any, index: Any, like: Any) -> Any:
    """Return element ``index`` (uint64) of the bytes at ``address`` (uint64, aligned or not) as float32."""


@instruction
def prefetched(address: Any, index: Any, like: Any) -> Any:
    """Begin to bring what lies around element ``index`` (uint64) of the bytes at ``address`` (uint64) near the CPU.

    It may lie anywhere, also where nothing is.
    """


@instruction
def byte_at(address: Any, index: Any) -> Any:
    """Return byte ``index`` (uint64) of those at ``address`` (uint64)."""


@instruction
def rounded(value: Any, like: Any) -> Any:
    """Return a float32 rounded to the dtype of ``like``, as float32."""


@instruction
def narrowed(value: Any, like: Any) -> Any:
    """Return the bits of a float32 that has been rounded to the dtype of ``like``; NaN is always the same quiet one."""


@instruction
def magnitude_bits(value: Any) -> Any:
    """Return the bits of ``abs(value)`` as int32; they order as the magnitudes do."""


@instruction
def magnitude_bin(value: Any, like: Any) -> Any:
    """Return the upper 15 bits of the key of ``abs(value)`` in the dtype of ``like``, as uint32."""


@instruction
def magnitude_key(value: Any, like: Any) -> Any:
    """Return the key of ``abs(value)`` in the dtype of ``like``, all bits of it, as uint32; the value is rounded."""


@instruction
def order_key(value: Any, like: Any) -> Any:
    """Return the key of a value in the dtype of ``like`` that orders as the values do; NaN is above all."""


@instruction
def fused_multiply_add(first: Any, second: Any, addend: Any) -> Any:
    """Return ``first * second + addend`` of float32, rounded once, whether or not the CPU has an instruction for it."""


@instruction
def signed_like(value: Any, sign: Any) -> Any:
    """Return ``value`` (float32) with its sign flipped where ``sign`` (float32) is negative."""


@instruction
def bits_of_double(value: Any) -> Any:
    """Return the bits of a float64 as int64."""


@instruction
def double_of_bits(bits: Any) -> Any:
    """Return the float64 that has these bits (int64)."""


@instruction
def bits_differ(first: Any, second: Any) -> Any:
    """Return 1 (int32) where two float32 differ in any bit, else 0; so a negative zero differs from a positive one."""


@instruction
def flipped(value: Any, bits: Any) -> Any:
    """Return ``value`` (float32) with its sign flipped where the highest of ``bits`` (uint32) is set."""
