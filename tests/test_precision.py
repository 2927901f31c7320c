"""Values in numpy as they are stored: what the bits of a block tell of it, to the definition and to the fast way."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.engine import compute
from mergefs.kernels.precision import Raw, is_finite, load

Question = Callable[[Raw, DType], bool]
both_ways = pytest.mark.parametrize("is_finite", (is_finite, compute.is_finite), ids=("numpy", "compiled"))
by_dtype = pytest.mark.parametrize("dtype", (BF16, F16, F32, F64), ids=lambda dtype: dtype.name)


@both_ways
@pytest.mark.parametrize("dtype", (BF16, F16), ids=lambda dtype: dtype.name)
def test_of_every_16_bit_pattern_it_is_told_whether_it_is_finite(dtype: DType, is_finite: Question) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    expected = np.isfinite(load(patterns.view(np.uint8), dtype, dtype))
    assert [is_finite(one.reshape(1).view(np.uint8), dtype) for one in patterns] == expected.tolist()


@both_ways
@by_dtype
@given(data=st.binary(max_size=64 * 8), place=st.integers(0, 63), special=st.sampled_from((np.inf, -np.inf, np.nan)))
def test_bytes_are_finite_where_all_their_values_are(
    dtype: DType, is_finite: Question, data: bytes, place: int, special: float
) -> None:
    raw = np.frombuffer(data, dtype=np.uint8)[: len(data) // dtype.itemsize * dtype.itemsize].copy()
    assert is_finite(raw, dtype) == np.isfinite(load(raw, dtype, dtype)).all()
    if raw.size:
        wide = {BF16: np.float32, F16: np.float16, F32: np.float32, F64: np.float64}[dtype]
        bits = np.array([special], dtype=wide).view(np.uint8)[-dtype.itemsize :]
        begin = place % (raw.size // dtype.itemsize) * dtype.itemsize
        raw[begin : begin + dtype.itemsize] = bits
        assert not is_finite(raw, dtype)


@both_ways
@by_dtype
def test_the_largest_finite_values_are_finite(dtype: DType, is_finite: Question) -> None:
    infinity = {BF16: 0x7F80, F16: 0x7C00, F32: 0x7F800000, F64: 0x7FF0000000000000}[dtype]
    unsigned = np.dtype(f"u{dtype.itemsize}")
    for largest, beyond in pairwise((infinity - 1, infinity, infinity + 1)):
        for sign in (0, 1 << (dtype.bits - 1)):
            raw = np.array([largest + sign, 0], dtype=unsigned).view(np.uint8)
            assert is_finite(raw, dtype) == (largest < infinity)
            assert not is_finite(np.array([beyond + sign], dtype=unsigned).view(np.uint8), dtype)
