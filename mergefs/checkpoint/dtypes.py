"""The element types of safetensors files."""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["float", "integer", "boolean", "complex", "code"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One element type: its safetensors name, its size, and what its bits stand for. There is one object of each.

    ``kind`` is ``float`` for the types that a merge computes in, ``code`` for the 4, 6 and 8 bit floating-point
    codes of quantised checkpoints, which mean nothing without their scales.
    """

    name: str
    bits: int
    kind: Kind
    torch_name: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element (types smaller than a byte have none: they are never merged)."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether tensors of this type can be merged."""
        return self.kind == "float"


BF16: Final = DType("BF16", 16, "float", "bfloat16")
F16: Final = DType("F16", 16, "float", "float16")
F32: Final = DType("F32", 32, "float", "float32")
F64: Final = DType("F64", 64, "float", "float64")

DTYPES: Final[dict[str, DType]] = {
    dtype.name: dtype
    for dtype in (
        BF16,
        F16,
        F32,
        F64,
        DType("BOOL", 8, "boolean", "bool"),
        DType("U8", 8, "integer", "uint8"),
        DType("I8", 8, "integer", "int8"),
        DType("U16", 16, "integer", "uint16"),
        DType("I16", 16, "integer", "int16"),
        DType("U32", 32, "integer", "uint32"),
        DType("I32", 32, "integer", "int32"),
        DType("U64", 64, "integer", "uint64"),
        DType("I64", 64, "integer", "int64"),
        DType("C64", 64, "complex", "complex64"),
        DType("F4", 4, "code", "float4_e2m1fn_x2"),
        DType("F6_E2M3", 6, "code", "float6_e2m3"),
        DType("F6_E3M2", 6, "code", "float6_e3m2"),
        DType("F8_E5M2", 8, "code", "float8_e5m2"),
        DType("F8_E4M3", 8, "code", "float8_e4m3fn"),
        DType("F8_E8M0", 8, "code", "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "code", "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "code", "float8_e5m2fnuz"),
    )
}

FLOAT_DTYPES_BY_TORCH_NAME: Final[dict[str, DType]] = {d.torch_name: d for d in (BF16, F16, F32, F64)}


def promote(first: DType, second: DType) -> DType:
    """Return the float type that both inputs convert to, by torch's promotion rules (BF16 with F16 is F32)."""
    if first == second:
        return first
    if F64 in (first, second):
        return F64
    return F32
