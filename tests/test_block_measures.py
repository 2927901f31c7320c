"""What is measured of a block: the formulas, the fused kernel against them, and what sketches promise."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import by_dtype, random_bytes, seeds
from numpy.typing import NDArray
from test_fused_kernels import run_python

from mergefs.checkpoint.dtypes import BF16, F32, F64, DType
from mergefs.kernels.deltas import BlockMeasures, ReferenceMeter, lane_sum
from mergefs.kernels.fused import FUSED_DTYPES, counting
from mergefs.kernels.fused import deltas as fused
from mergefs.kernels.precision import load, store
from mergefs.kernels.sketch import SKETCH_SIZE, quantised, signs_and_places, sketch
from mergefs.statistics.blocks import BlockDeltas

sizes = st.integers(1, 400) | st.integers(fused.TILE - 130, 3 * fused.TILE + 130)
starts = st.integers(0, 2**40)

# The numbers ----------------------------------------------------------------------------------------------------------


def assert_same(found: BlockMeasures, expected: BlockMeasures) -> None:
    """Assert that two measures have the same bits, NaN being NaN."""
    for name in ("squared_norm", "absolute_sum", "largest", "changed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(found.sketch, expected.sketch)
    np.testing.assert_array_equal(np.signbit(found.sketch[found.sketch == 0]), False)


@by_dtype
@settings(max_examples=60)
@given(seed=seeds, size=sizes, start=starts)
def test_the_fused_meter_has_the_bits_of_the_reference(dtype: DType, seed: int, size: int, start: int) -> None:
    generator = np.random.default_rng(seed)
    meters = fused.FusedMeter(dtype), ReferenceMeter(dtype)
    with np.errstate(all="ignore"):
        for _ in range(2):
            base = random_bytes(generator, size, dtype)
            expert = base.copy() if generator.random() < 0.2 else random_bytes(generator, size, dtype)
            found, expected = (meter.measure(expert, base, start) for meter in meters)
            assert_same(found, expected)
            norms = [meter.squared_norm(base) for meter in meters]
            np.testing.assert_array_equal(norms[0], norms[1])
        counts = [meter.histogram() for meter in meters]
        np.testing.assert_array_equal(counts[0], counts[1])
    assert counts[0].sum() == 2 * size


def test_counts_move_on_before_their_tables_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_MOST_COUNTED", 1000)
    raw = np.arange(700, dtype=np.uint16).view(np.uint8)
    meter = fused.FusedMeter(BF16)
    for _ in range(5):
        meter.measure(raw, raw, 0)
        assert meter._counts._in_tables < 1000
    assert meter.histogram()[0] == 5 * 700


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=lambda dtype: dtype.name)
def test_measures_are_what_they_are_called(dtype: DType) -> None:
    generator = np.random.default_rng(5)
    base, expert = (store(generator.standard_normal(1000), F64, dtype) for _ in range(2))
    values, origin = (load(raw, dtype, dtype) for raw in (expert, base))
    found = ReferenceMeter(dtype).measure(expert, base, 0)
    delta = [float(a) - float(b) for a, b in zip(values, origin, strict=True)]
    if dtype != F64:
        delta = [float(np.float32(entry)) for entry in delta]
    assert found.squared_norm == pytest.approx(float(sum(Fraction(d) ** 2 for d in delta)), rel=1e-13)
    assert found.absolute_sum == pytest.approx(math.fsum(map(abs, delta)), rel=1e-13)
    assert found.largest == max(map(abs, delta))
    assert found.changed == sum(a != b for a, b in zip(values, origin, strict=True))


def measures_in_hexadecimal() -> str:
    """Return what the fused meters find in one block of each dtype."""
    generator = np.random.default_rng(11)
    found = []
    for dtype in FUSED_DTYPES:
        base, expert = (store(generator.standard_normal(3000), F64, dtype) for _ in range(2))
        meter = fused.FusedMeter(dtype)
        block = meter.measure(expert, base, 640)
        numbers = [block.squared_norm, block.absolute_sum, block.largest, float(block.changed)]
        numbers.append(meter.squared_norm(base))
        counts = meter.histogram()
        found += [np.array(numbers).tobytes().hex(), block.sketch.tobytes().hex(), counts[counts > 0].tobytes().hex()]
    return " ".join(found)


def test_a_cpu_without_large_vectors_finds_the_same_bits(tmp_path: Path) -> None:
    code = "from test_block_measures import measures_in_hexadecimal; print(measures_in_hexadecimal())"
    oldest = run_python(code, tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert oldest.split() == measures_in_hexadecimal().split()


def test_lanes_are_added_in_halves() -> None:
    """Of terms that cancel, the order of the sum decides what is left."""
    terms = np.zeros(300)
    terms[[0, 64, 128]] = 1e17, -1e17, 1.0  # lane 0 first becomes 1e17 + 1, which is 1e17
    assert lane_sum(terms) == 0.0
    terms[[128, 129]] = 0.0, 1.0
    assert lane_sum(terms) == 1.0


# Sketches -------------------------------------------------------------------------------------------------------------


def test_elements_of_a_chunk_go_to_different_buckets_and_a_column_to_all() -> None:
    _, places = signs_and_places(0, 128 * 512)
    chunks = (places % SKETCH_SIZE).reshape(512, 128)
    assert (np.sort(chunks, axis=1) == np.arange(128)).all()
    counts = np.bincount(chunks[:, 7], minlength=128)  # a column of a matrix with rows of 128
    assert counts.max() <= 16
    assert np.count_nonzero(counts) > 100


def test_signs_are_fair_and_depend_on_the_flat_index_alone() -> None:
    signs, places = signs_and_places(0, 128 * 512)
    assert abs(float(signs.sum())) < 4 * math.sqrt(signs.size)
    by_element = signs.reshape(512, 128).sum(axis=0)
    assert np.abs(by_element).max() < 5 * math.sqrt(512)
    later_signs, later_places = signs_and_places(128 * 100, 1000)
    np.testing.assert_array_equal(later_signs, signs[12800:13800])
    np.testing.assert_array_equal(later_places, places[12800:13800])


def noise(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    return generator.standard_normal((rows, columns)).astype(np.float32)


def hot_columns(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    delta = noise(generator, rows, columns)
    delta[:, [3, 70, 71]] *= 50
    return delta


def hot_rows(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    delta = noise(generator, rows, columns)
    delta[[1, rows // 2]] *= 50
    return delta


def one_column(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    delta = np.zeros((rows, columns), dtype=np.float32)
    delta[:, 5] = 1
    return delta


def low_rank(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    return noise(generator, rows, 2) @ noise(generator, 2, columns)


KINDS = {make.__name__: make for make in (noise, hot_columns, hot_rows, one_column, low_rank)}


@pytest.mark.parametrize("columns", [256, 192, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", ["independent", "identical", "cancelling", "related"])
def test_inner_products_are_unbiased_and_as_sharp_as_theory_says(kind: str, relation: str, columns: int) -> None:
    """The error in units of the standard deviation sqrt((|a|^2 |b|^2 + <a, b>^2) / 128), over many blocks."""
    generator = np.random.default_rng(columns)
    trials, rows = 300, 24
    errors = []
    for trial in range(trials):
        first = KINDS[kind](generator, rows, columns).ravel()
        second = KINDS[kind](generator, rows, columns).ravel()
        match relation:
            case "identical":
                second = first.copy()
            case "cancelling":
                second = -first
            case "related":
                second = first / 2 + second
        start = trial * rows * columns
        sketches, scales = quantised(np.stack([sketch(first, start), sketch(second, start)]))
        steps = int(sketches[0].astype(np.int64) @ sketches[1].astype(np.int64))
        estimate = float(scales[0]) * float(scales[1]) * steps
        exact = float(first.astype(np.float64) @ second)
        norms = float((first.astype(np.float64) ** 2).sum()) * float((second.astype(np.float64) ** 2).sum())
        errors.append((estimate - exact) / math.sqrt((norms + exact**2) / SKETCH_SIZE))
    assert abs(np.mean(errors)) < 4 / math.sqrt(trials)
    assert np.std(errors) < 1.15


def test_a_sketch_in_steps_is_close_to_the_sketch_and_one_that_is_not_finite_is_zero() -> None:
    generator = np.random.default_rng(1)
    sketches = generator.standard_normal((5, SKETCH_SIZE)).astype(np.float32)
    sketches[1, 7] = np.inf
    sketches[2, 8] = np.nan
    sketches[3] = 0
    sketches[4] *= np.float32(1e-44)
    steps, scales = quantised(sketches)
    assert (steps.dtype, scales.dtype) == (np.int8, np.float32)
    assert np.abs(steps[0]).max() == 127
    np.testing.assert_allclose(steps[0] * scales[0], sketches[0], atol=float(scales[0]) * 0.501)
    assert not steps[1:4].any()
    assert not scales[1:4].any()
    assert np.isfinite(scales).all()


# What is kept of them -------------------------------------------------------------------------------------------------


def test_what_is_beyond_float32_is_its_largest_value() -> None:
    largest = float(np.finfo(np.float32).max)
    zeros = np.zeros(SKETCH_SIZE, dtype=np.float32)
    found = BlockDeltas.of(
        [None, BlockMeasures(math.nan, math.inf, 1e300, 3, zeros + np.inf), BlockMeasures(4.0, 2.0, 2.0, 1, zeros + 1)]
    )
    assert found.squared_norms.tolist() == [0.0, largest, 4.0]
    assert found.absolute_sums.tolist() == [0.0, largest, 2.0]
    assert found.largest.tolist() == [0.0, largest, 2.0]
    assert found.changed.tolist() == [0, 3, 1]
    assert not found.sketches[:2].any()
    assert (found.sketches[2] == 127).all()
