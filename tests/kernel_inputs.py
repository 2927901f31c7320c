"""Inputs for kernels, and what it means that a fused kernel equals its reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.engine.compute import run_kernel
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.methods.contract import Method

SPECIAL_VALUES = (
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    6e-8,
    -6e-5,
    6.1e-5,
    65504.0,
    65520.0,
    1e30,
    -3.4e38,
    np.inf,
    -np.inf,
    np.nan,
)
FACTORS = (0.0, -0.0, 1.0, -1.0, 0.3, 1e-9, 3e38, np.inf, np.nan)

by_dtype = pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=lambda dtype: dtype.name)
seeds = st.integers(0, 2**63 - 1)
factors = st.sampled_from(FACTORS) | st.floats(-4, 4)
"""Weights, scales and divisors, before they are rounded to the compute dtype."""


def elements(raw: Raw, dtype: DType) -> NDArray[Any]:
    """Return the bit patterns of ``raw`` with one pattern for all NaN."""
    bits: NDArray[Any] = raw.view({16: np.uint16, 32: np.uint32, 64: np.uint64}[dtype.bits]).copy()
    bits[np.isnan(load(raw, dtype, dtype))] = 0x7FFF
    return bits


def random_bytes(generator: np.random.Generator, size: int, dtype: DType) -> Raw:
    """Return elements of one of four kinds: any bits, values like weights, values with many ties, special values."""
    with np.errstate(all="ignore"):
        match generator.integers(4):
            case 0:
                return generator.integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
            case 1:
                values = generator.standard_normal(size) * 10.0 ** generator.uniform(-8, 2)
            case 2:
                values = generator.integers(-3, 4, size) * 2.0 ** generator.integers(-24, 4)
            case _:
                values = generator.choice(SPECIAL_VALUES, size)
        return store(Precision(dtype).round(values.astype(np.float32)), dtype, dtype)


def random_inputs(seed: int, count: int, size: int, dtype: DType) -> tuple[tuple[Raw, DType], ...]:
    """Return ``count`` inputs stored in ``dtype``."""
    generator = np.random.default_rng(seed)
    return tuple((random_bytes(generator, size, dtype), dtype) for _ in range(count))


def assert_equals_reference(
    method: Method[Any],
    coefficients: Any,
    inputs: tuple[tuple[Raw, DType], ...],
    compute: DType,
    start: int = 0,
    out: DType | None = None,
) -> None:
    """Assert that both ways give the same bits, NaN standing for any NaN."""
    out = out or compute
    fused = run_kernel(method, coefficients, inputs, compute, out, start)
    reference = run_kernel(method, coefficients, inputs, compute, out, start, fused=False)
    np.testing.assert_array_equal(elements(fused, out), elements(reference, out))
