"""What the compiler makes of the instructions that ``mergefs.kernels.fused.values`` declares: LLVM's, without branches,
so that loops vectorise. Importing this imports numba.
"""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_Operation: TypeAlias = Callable[[Any, Any, Any], Any]
"""Generates the instructions for one element, from numba's context, the builder and the operand."""

_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)
_HALF = ir.HalfType()
_FLOAT = ir.FloatType()
_SIGN = 0x80000000
_INFINITY = 0x7F800000
_HALF_SMALLEST_NORMAL = 0x38800000  # 2**-14
_HALF_FIRST_OVERFLOW = 0x477FF000  # 65520, the least that rounds to infinity
_TO_READ, _NEAREST, _DATA = 0, 3, 1  # of LLVM's prefetch
_EXPONENT_GAP = 0x38000000  # between the exponent biases of float32 and float16


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function`` what kernels call by the name of an instruction; it generates code where they do."""
    generated: Callable[..., Any] = intrinsic(function)
    return generated


def _int32(value: int) -> ir.Constant:
    return ir.Constant(_INT32, value)


def _float(value: float) -> ir.Constant:
    return ir.Constant(_FLOAT, value)


def _magnitude(builder: Any, value: Any) -> Any:
    """Return the bits of a float32 without the sign."""
    return builder.and_(builder.bitcast(value, _INT32), _int32(0x7FFFFFFF))


def _converts_halves(context: Any) -> bool:
    """Return whether the CPU that code is generated for converts F16 itself; the results are the same."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features.split(",") or triple.startswith("aarch64")


def _widen_bfloat16(context: Any, builder: Any, bits: Any) -> Any:
    """Return the float32 of BF16 bits."""
    return builder.bitcast(builder.shl(builder.zext(bits, _INT32), _int32(16)), _FLOAT)


def _widen_float16(context: Any, builder: Any, bits: Any) -> Any:
    """Return the float32 of F16 bits; subnormals by a subtraction, which no CPU is slow at."""
    if _converts_halves(context):
        return builder.fpext(builder.bitcast(bits, _HALF), _FLOAT)
    wide = builder.zext(bits, _INT32)
    magnitude = builder.shl(builder.and_(wide, _int32(0x7FFF)), _int32(13))
    normal = builder.add(magnitude, _int32(_EXPONENT_GAP))
    special = builder.or_(magnitude, _int32(_INFINITY))
    shifted = builder.bitcast(builder.add(magnitude, _int32(_HALF_SMALLEST_NORMAL)), _FLOAT)
    subnormal = builder.bitcast(builder.fsub(shifted, _float(2.0**-14)), _INT32)
    finite = builder.select(builder.icmp_signed("<", magnitude, _int32(0x00800000)), subnormal, normal)
    value = builder.select(builder.icmp_signed(">=", magnitude, _int32(0x0F800000)), special, finite)
    sign = builder.shl(builder.and_(wide, _int32(0x8000)), _int32(16))
    return builder.bitcast(builder.or_(value, sign), _FLOAT)


def _round_bfloat16(context: Any, builder: Any, value: Any) -> Any:
    """Return the nearest BF16, ties to even, as float32."""
    bits = builder.bitcast(value, _INT32)
    odd = builder.and_(builder.lshr(bits, _int32(16)), _int32(1))
    rounded = builder.add(bits, builder.add(odd, _int32(0x7FFF)))
    return builder.bitcast(builder.and_(rounded, _int32(0xFFFF0000)), _FLOAT)


def _round_float16(context: Any, builder: Any, value: Any) -> Any:
    """Return the nearest F16, ties to even, as float32; what is below 2**-14 is rounded by adding 0.5."""
    if _converts_halves(context):
        return builder.fpext(builder.fptrunc(value, _HALF), _FLOAT)
    bits = builder.bitcast(value, _INT32)
    magnitude = _magnitude(builder, value)
    odd = builder.and_(builder.lshr(magnitude, _int32(13)), _int32(1))
    normal = builder.and_(builder.add(magnitude, builder.add(odd, _int32(0xFFF))), _int32(0xFFFFE000))
    is_infinite_or_nan = builder.icmp_signed(">", magnitude, _int32(_INFINITY))
    special = builder.select(is_infinite_or_nan, magnitude, _int32(_INFINITY))
    large = builder.select(builder.icmp_signed(">=", magnitude, _int32(_HALF_FIRST_OVERFLOW)), special, normal)
    half = _float(0.5)
    steps = builder.fsub(builder.fadd(builder.bitcast(magnitude, _FLOAT), half), half)
    is_small = builder.icmp_signed("<", magnitude, _int32(_HALF_SMALLEST_NORMAL))
    rounded = builder.select(is_small, builder.bitcast(steps, _INT32), large)
    return builder.bitcast(builder.or_(rounded, builder.and_(bits, _int32(_SIGN))), _FLOAT)


def _narrow_bfloat16(context: Any, builder: Any, value: Any) -> Any:
    """Return the bits of a float32 that is a BF16."""
    bits = builder.trunc(builder.lshr(builder.bitcast(value, _INT32), _int32(16)), _INT16)
    return builder.select(builder.fcmp_unordered("uno", value, value), ir.Constant(_INT16, 0x7FC0), bits)


def _narrow_float16_magnitude(builder: Any, magnitude: Any) -> Any:
    """Return the F16 bits, in 32, of a finite float32 that is an F16 and not negative."""
    normal = builder.lshr(builder.sub(magnitude, _int32(_EXPONENT_GAP)), _int32(13))
    shifted = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _FLOAT), _float(0.5)), _INT32)
    subnormal = builder.sub(shifted, _int32(0x3F000000))
    return builder.select(builder.icmp_signed("<", magnitude, _int32(_HALF_SMALLEST_NORMAL)), subnormal, normal)


def _narrow_float16(context: Any, builder: Any, value: Any) -> Any:
    """Return the bits of a float32 that is an F16."""
    canonical = ir.Constant(_INT16, 0x7E00)
    if _converts_halves(context):
        narrow = builder.bitcast(builder.fptrunc(value, _HALF), _INT16)
        return builder.select(builder.fcmp_unordered("uno", value, value), canonical, narrow)
    magnitude = _magnitude(builder, value)
    finite = _narrow_float16_magnitude(builder, magnitude)
    whole = builder.select(builder.icmp_signed(">=", magnitude, _int32(_INFINITY)), _int32(0x7C00), finite)
    sign = builder.and_(builder.lshr(builder.bitcast(value, _INT32), _int32(16)), _int32(0x8000))
    narrow = builder.trunc(builder.or_(whole, sign), _INT16)
    return builder.select(builder.fcmp_unordered("uno", value, value), canonical, narrow)


def _narrow_float32(context: Any, builder: Any, value: Any) -> Any:
    """Return the bits of a float32."""
    bits = builder.bitcast(value, _INT32)
    return builder.select(builder.fcmp_unordered("uno", value, value), _int32(0x7FC00000), bits)


def _bin_bfloat16(context: Any, builder: Any, value: Any) -> Any:
    """Return the upper half of the magnitude; all NaN are one."""
    upper = builder.lshr(_magnitude(builder, value), _int32(16))
    return builder.select(builder.fcmp_unordered("uno", value, value), _int32(0x7FC0), upper)


def _bin_float16(context: Any, builder: Any, value: Any) -> Any:
    """Return the F16 bits of the magnitude, with the payload of NaN."""
    if _converts_halves(context):
        narrow = builder.bitcast(builder.fptrunc(value, _HALF), _INT16)
        return builder.zext(builder.and_(narrow, ir.Constant(_INT16, 0x7FFF)), _INT32)
    magnitude = _magnitude(builder, value)
    payload = builder.and_(builder.lshr(magnitude, _int32(13)), _int32(0x3FF))
    finite = _narrow_float16_magnitude(builder, magnitude)
    special = builder.or_(payload, _int32(0x7C00))
    return builder.select(builder.icmp_signed(">=", magnitude, _int32(_INFINITY)), special, finite)


def _bin_float32(context: Any, builder: Any, value: Any) -> Any:
    """Return the upper 15 bits of the magnitude."""
    return builder.lshr(_magnitude(builder, value), _int32(16))


def _key_float32(context: Any, builder: Any, value: Any) -> Any:
    """Return the bits of the magnitude."""
    return _magnitude(builder, value)


def _ordered(builder: Any, value: Any, bits: Any, width: int) -> Any:
    """Return the order key of a number from its ``bits``, of which there are ``width`` in a 32 bit integer."""
    sign, every = _int32(1 << (width - 1)), _int32((1 << width) - 1)
    negative = builder.icmp_unsigned("!=", builder.and_(bits, sign), _int32(0))
    key = builder.select(negative, builder.xor(bits, every), builder.or_(bits, sign))
    return builder.select(builder.fcmp_unordered("uno", value, value), every, key)


def _order_bfloat16(context: Any, builder: Any, value: Any) -> Any:
    """Return the order key of a float32 that is a BF16."""
    return _ordered(builder, value, builder.lshr(builder.bitcast(value, _INT32), _int32(16)), 16)


def _order_float16(context: Any, builder: Any, value: Any) -> Any:
    """Return the order key of a float32 that is an F16."""
    return _ordered(builder, value, builder.zext(_narrow_float16(context, builder, value), _INT32), 16)


def _order_float32(context: Any, builder: Any, value: Any) -> Any:
    """Return the order key of a float32."""
    return _ordered(builder, value, builder.bitcast(value, _INT32), 32)


_WIDEN: Final[dict[Any, tuple[ir.Type, _Operation]]] = {
    types.uint16: (_INT16, _widen_bfloat16),
    types.int16: (_INT16, _widen_float16),
    types.uint32: (_INT32, lambda context, builder, bits: builder.bitcast(bits, _FLOAT)),
}
_ROUND: Final[dict[Any, _Operation]] = {
    types.uint16: _round_bfloat16,
    types.int16: _round_float16,
    types.uint32: lambda context, builder, value: value,
}
_NARROW: Final[dict[Any, _Operation]] = {
    types.uint16: _narrow_bfloat16,
    types.int16: _narrow_float16,
    types.uint32: _narrow_float32,
}


_BIN: Final[dict[Any, _Operation]] = {
    types.uint16: _bin_bfloat16,
    types.int16: _bin_float16,
    types.uint32: _bin_float32,
}
_ORDER: Final[dict[Any, _Operation]] = {
    types.uint16: _order_bfloat16,
    types.int16: _order_float16,
    types.uint32: _order_float32,
}
_KEY: Final[dict[Any, _Operation]] = {**_BIN, types.uint32: _key_float32}
"""A 16 bit magnitude has 15 bits, all of which its bin has."""


@_instruction
def loaded(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Return element ``index`` (uint64) of the bytes at ``address`` (uint64, aligned or not) as float32."""
    storage, widen = _WIDEN[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], storage.as_pointer())
        element = builder.load(builder.gep(pointer, [arguments[1]]), align=1)
        return widen(context, builder, element)

    return types.float32(types.uint64, types.uint64, like), generate


@_instruction
def prefetched(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Begin to bring what lies around element ``index`` (uint64) of the bytes at ``address`` (uint64) near the CPU."""
    storage, _ = _WIDEN[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        octets = ir.IntType(8).as_pointer()
        pointer = builder.gep(builder.inttoptr(arguments[0], storage.as_pointer()), [arguments[1]])
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [octets], ir.FunctionType(ir.VoidType(), [octets, _INT32, _INT32, _INT32])
        )
        builder.call(prefetch, [builder.bitcast(pointer, octets), *map(_int32, (_TO_READ, _NEAREST, _DATA))])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, like), generate


@_instruction
def byte_at(typing_context: Any, address: Any, index: Any) -> Any:
    """Return byte ``index`` (uint64) of those at ``address`` (uint64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.uint8(types.uint64, types.uint64), generate


@_instruction
def rounded(typing_context: Any, value: Any, like: Any) -> Any:
    """Return a float32 rounded to the dtype of ``like``, as float32."""
    narrow = _ROUND[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return narrow(context, builder, arguments[0])

    return types.float32(types.float32, like), generate


@_instruction
def narrowed(typing_context: Any, value: Any, like: Any) -> Any:
    """Return the bits of a float32 that has been rounded to the dtype of ``like``; NaN is always the same quiet one."""
    narrow = _NARROW[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return narrow(context, builder, arguments[0])

    return like.dtype(types.float32, like), generate


@_instruction
def magnitude_bits(typing_context: Any, value: Any) -> Any:
    """Return the bits of ``abs(value)`` as int32; they order as the magnitudes do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _magnitude(builder, arguments[0])

    return types.int32(types.float32), generate


@_instruction
def magnitude_bin(typing_context: Any, value: Any, like: Any) -> Any:
    """Return the upper 15 bits of the key of ``abs(value)`` in the dtype of ``like``, as uint32."""
    choose = _BIN[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return choose(context, builder, arguments[0])

    return types.uint32(types.float32, like), generate


@_instruction
def magnitude_key(typing_context: Any, value: Any, like: Any) -> Any:
    """Return the key of ``abs(value)`` in the dtype of ``like``, all bits of it, as uint32; the value is rounded."""
    choose = _KEY[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return choose(context, builder, arguments[0])

    return types.uint32(types.float32, like), generate


@_instruction
def order_key(typing_context: Any, value: Any, like: Any) -> Any:
    """Return the key of a value in the dtype of ``like`` that orders as the values do; NaN is above all."""
    choose = _ORDER[like.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Both zeros have the same key.
        return choose(context, builder, builder.fadd(arguments[0], _float(0.0)))

    return types.uint32(types.float32, like), generate


@_instruction
def fused_multiply_add(typing_context: Any, first: Any, second: Any, addend: Any) -> Any:
    """Return ``first * second + addend`` of float32, rounded once, whether or not the CPU has an instruction for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_instruction
def signed_like(typing_context: Any, value: Any, sign: Any) -> Any:
    """Return ``value`` (float32) with its sign flipped where ``sign`` (float32) is negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sign_bit = builder.and_(builder.bitcast(arguments[1], _INT32), _int32(_SIGN))
        return builder.bitcast(builder.xor(builder.bitcast(arguments[0], _INT32), sign_bit), _FLOAT)

    return types.float32(types.float32, types.float32), generate


@_instruction
def bits_of_double(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float64 as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@_instruction
def double_of_bits(typing_context: Any, bits: Any) -> Any:
    """Return the float64 that has these bits (int64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@_instruction
def bits_differ(typing_context: Any, first: Any, second: Any) -> Any:
    """Return 1 (int32) where two float32 differ in any bit, else 0; so a negative zero differs from a positive one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = [builder.bitcast(argument, _INT32) for argument in arguments]
        return builder.zext(builder.icmp_unsigned("!=", *bits), _INT32)

    return types.int32(types.float32, types.float32), generate


@_instruction
def flipped(typing_context: Any, value: Any, bits: Any) -> Any:
    """Return ``value`` (float32) with its sign flipped where the highest of ``bits`` (uint32) is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sign_bit = builder.and_(arguments[1], _int32(_SIGN))
        return builder.bitcast(builder.xor(builder.bitcast(arguments[0], _INT32), sign_bit), _FLOAT)

    return types.float32(types.float32, types.uint32), generate
