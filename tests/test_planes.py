"""The trellis code of deltas: what its bits mean, that the best are found, and what each plane leaves."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.kernels.fused.trellis import Tables
from mergefs.kernels.fused.trellis_search import Search
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.kernels.trellis import PLANES, STATES, STEP, decode, states, stream_bytes
from mergefs.kernels.trellis_books import BOOKS
from mergefs.planes.cell import CodedCell, Prefixes, encode_cell
from mergefs.planes.layout import (
    CHECK_BYTES,
    MOST_CELLS,
    RecordLayout,
    cell_grid,
    cells_per_block,
    group_size,
)
from mergefs.planes.scales import scale_codes, scales_of
from mergefs.sources.blocks import BlockGrid

REPOSITORY = Path(__file__).parent.parent
COMPUTE = {"bf16": BF16, "fp16": F16, "fp32": F32, "fp64": F64}
by_compute = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)
seeds = st.integers(0, 2**32 - 1)


def values_of(values: NDArray[np.float64], dtype: DType) -> Array:
    """Round to values of a dtype, in its carrier."""
    if dtype == F64:
        return values
    return Precision(dtype).round(values.astype(np.float32))


def random_cell(seed: int, elements: int, dtype: DType, size: float = 0.002) -> tuple[Array, Array]:
    """Return an expert's and the base's values, with some stretches in which they are equal."""
    generator = np.random.default_rng(seed)
    base = values_of(0.02 * generator.standard_normal(elements), dtype)
    spread = size * np.exp(generator.standard_normal(elements // 40 + 1)).repeat(40)[:elements]
    spread[generator.random(elements // 40 + 1).repeat(40)[:elements] < 0.3] = 0
    return values_of(base.astype(np.float64) + spread * generator.standard_normal(elements), dtype), base


def decoded_by_the_definition(record: Raw, base: Array, compute: DType, group: int, planes: int) -> Array:
    """Read a record as its layout says, and decode each plane as the code says."""
    groups = -(-base.size // group)
    scales = scales_of(record[1 : 1 + groups], int(record[:1].view(np.int8)[0])).repeat(group)[: base.size]
    kept = scales > 0
    size = stream_bytes(int(kept.sum()))
    starts = (1 + groups + plane * (size + CHECK_BYTES) for plane in range(planes))
    result = base.copy()
    streams = [record[start : start + size] for start in starts]
    result[kept] = decode(streams, BOOKS, scales[kept], base[kept], Precision(compute))
    return result


def first_planes(record: Raw, elements: int, group: int, coded: int, planes: int) -> Prefixes:
    """Return the first planes of the record of one cell."""
    size = 1 + -(-elements // group) + planes * (stream_bytes(coded) + CHECK_BYTES)
    return Prefixes(record[:size], np.array([size]), np.array([coded]), elements, group, planes)


def decode_cell(record: Raw, base: Raw, compute: DType, group: int, coded: int, planes: int) -> Raw:
    """Return the values of one cell."""
    return first_planes(record, base.size // compute.itemsize, group, coded, planes).decode(base, compute)


def octets(cell: CodedCell) -> Raw:
    return np.frombuffer(cell.record, dtype=np.uint8)


# What the bits mean ---------------------------------------------------------------------------------------------------


def test_a_state_is_made_of_eight_bits_of_the_stream_and_the_next_one_keeps_seven() -> None:
    stream = np.array([0b10110100, 0b00000111], dtype=np.uint8)
    assert states(stream, 3).tolist() == [0b10110100, 0b11011010, 0b11101101]


@given(seed=seeds, elements=st.integers(1, 3000), group=st.integers(1, 700), planes=st.integers(1, PLANES))
@settings(max_examples=60)
@by_compute
def test_the_kernel_decodes_what_the_definition_says(
    compute: DType, seed: int, elements: int, group: int, planes: int
) -> None:
    generator = np.random.default_rng(seed)
    groups = -(-elements // group)
    codes = generator.integers(0, 256, groups, dtype=np.uint8) * (generator.random(groups) < 0.7)
    sizes = np.minimum(group, elements - group * np.arange(groups))
    coded = int(sizes[codes > 0].sum())
    planes_and_checks = planes * (stream_bytes(coded) + CHECK_BYTES) if coded else 0
    record: Raw = generator.integers(0, 256, 1 + groups + planes_and_checks, dtype=np.uint8)
    record[:1] = np.array([generator.integers(-20, 3)], dtype=np.int8).view(np.uint8)
    record[1 : 1 + groups] = codes
    base = values_of(generator.standard_normal(elements), compute)
    if coded:
        found = decode_cell(record, store(base, compute, compute), compute, group, coded, planes)
        expected = decoded_by_the_definition(record, base, compute, group, planes)
        assert np.array_equal(found, store(expected, compute, compute))


def test_what_is_added_to_does_not_have_to_be_aligned() -> None:
    expert, base = random_cell(5, 900, BF16)
    cell = encode_cell(expert, base, BF16, 256, 2)
    room: Raw = np.zeros(1801, dtype=np.uint8)
    room[1:] = store(base, BF16, BF16)
    aligned = decode_cell(octets(cell), store(base, BF16, BF16), BF16, 256, cell.coded, 2)
    assert np.array_equal(decode_cell(octets(cell), room[1:], BF16, 256, cell.coded, 2), aligned)


def test_the_sums_of_all_planes_fit_into_a_lane_and_those_of_other_books_are_refused() -> None:
    tables = Tables.of(BOOKS)
    lanes = tables.windows.view(np.uint16).reshape(PLANES, -1, 4)
    assert lanes.max(axis=(1, 2)).astype(int).sum() <= 65535
    assert np.abs(BOOKS.astype(int)).max(axis=1).sum() < 32768
    with pytest.raises(ValueError, match="16 bits"):
        Tables.of(BOOKS * np.int16(3))


def test_every_plane_can_leave_the_sum_as_it_is() -> None:
    assert (BOOKS[:, 0] == 0).all()


def test_scales_are_eighths_of_octaves_below_a_power_of_two() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for exponent in (-100, -9, 0, 5):
        scales = scales_of(codes, exponent)
        assert scales[0] == 0
        assert scales[1:] == pytest.approx(2.0 ** (exponent + (codes[1:] - 256.0) / 8), rel=1e-6)
        assert scale_codes(scales.astype(np.float64), exponent).tolist() == codes.tolist()


@given(scale=st.floats(1e-8, 1), exponent=st.integers(-60, 60))
def test_a_scale_is_the_nearest_one_in_ratio(scale: float, exponent: int) -> None:
    wanted = np.array([scale * 2.0**exponent])
    nearest = float(scales_of(scale_codes(wanted, exponent), exponent)[0])
    assert abs(np.log2(nearest / wanted[0])) <= 1 / 16 + 1e-6 or (scale > 2 ** (-1 / 8) and nearest < wanted[0])


# The best bits --------------------------------------------------------------------------------------------------------


@given(seed=seeds, elements=st.integers(1, 5))
@settings(max_examples=30)
def test_the_bits_that_are_found_are_the_best_of_all(seed: int, elements: int) -> None:
    generator = np.random.default_rng(seed)
    targets = generator.standard_normal(elements).astype(np.float32)
    ends, scales = np.array([elements]), np.array([0.8], dtype=np.float32)
    sums: NDArray[np.int32] = np.zeros(elements, dtype=np.int32)
    Search().plane(targets, sums, ends, scales, BOOKS[0])
    values = BOOKS[0].astype(np.float64) * STEP * 0.8

    def error(path: NDArray[np.int64]) -> float:
        return float(((targets - values[path]) ** 2).sum())

    everything = itertools.product((0, 1), repeat=elements + 7)
    streams = (np.packbits(np.array(bits, dtype=np.uint8), bitorder="little") for bits in everything)
    best = min(error(states(stream, elements)) for stream in streams)
    found = float(((targets - sums * STEP * 0.8) ** 2).sum())
    assert found == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("elements", [1, 2, 7, 8, 9, 2047, 2048, 2049, 6000])
def test_the_sums_are_those_of_the_bits(elements: int) -> None:
    targets = np.random.default_rng(1).standard_normal(elements).astype(np.float32)
    sums: NDArray[np.int32] = np.full(elements, 7, dtype=np.int32)
    stream = Search().plane(targets, sums, np.array([elements]), np.ones(1, dtype=np.float32), BOOKS[0])
    assert stream.size == stream_bytes(elements)
    assert (sums - 7).tolist() == BOOKS[0][states(stream, elements)].tolist()


def test_zeros_cost_no_error() -> None:
    targets = np.zeros(3000, dtype=np.float32)
    sums: NDArray[np.int32] = np.zeros(3000, dtype=np.int32)
    for book in BOOKS:
        Search().plane(targets, sums, np.array([3000]), np.ones(1, dtype=np.float32), book)
    assert not sums.any()


@pytest.mark.parametrize(("planes", "largest"), [(1, 0.535), (2, 0.286), (4, 0.086), (8, 0.02)])
def test_gaussian_deltas_leave_no_more_than_is_stated(planes: int, largest: float) -> None:
    generator = np.random.default_rng(9)
    base = generator.standard_normal(1 << 17).astype(np.float32)
    expert = base + np.float32(0.01) * generator.standard_normal(base.size).astype(np.float32)
    cell = encode_cell(expert, base, F32, 256, planes)
    assert np.sqrt(cell.left[planes] / cell.left[0]) < largest


# What is left ---------------------------------------------------------------------------------------------------------


@given(seed=seeds, elements=st.integers(1, 2500), group=st.integers(1, 600), size=st.sampled_from([1e-12, 1e-4, 1.0]))
@settings(max_examples=30)
@by_compute
def test_errors_are_those_of_what_is_decoded_and_never_rise(
    compute: DType, seed: int, elements: int, group: int, size: float
) -> None:
    expert, base = random_cell(seed, elements, compute, size)
    cell = encode_cell(expert, base, compute, group, 3)
    raw = store(base, compute, compute)
    exact = expert.astype(np.float64)
    for level in range(4):
        values = (
            load(decode_cell(octets(cell), raw, compute, group, cell.coded, level), compute, compute)
            if (level and cell.coded)
            else base
        )
        assert cell.left[level] == pytest.approx(float(((exact - values) ** 2).sum()), rel=1e-9)
    assert list(cell.left) == sorted(cell.left, reverse=True)


@pytest.mark.parametrize("elements", [1, 2, 3])
@pytest.mark.parametrize("planes", [1, 8])
def test_few_elements_are_coded_like_many(elements: int, planes: int) -> None:
    base = np.zeros(elements, dtype=np.float32)
    expert = np.array([0.25, -3.0, 1e-6], dtype=np.float32)[:elements]
    cell = encode_cell(expert, base, F32, 256, planes)
    assert cell.coded == elements
    assert cell.left[planes] < 0.2 * cell.left[0]


@by_compute
def test_a_cell_that_is_the_bases_has_no_record(compute: DType) -> None:
    base = values_of(np.random.default_rng(2).standard_normal(700), compute)
    cell = encode_cell(base, base, compute, 256, 4)
    assert (cell.record, cell.coded, cell.left) == (b"", 0, (0.0,) * 5)


def test_groups_that_are_the_bases_take_no_bits() -> None:
    base = np.zeros(2560, dtype=np.float32)
    expert = base.copy()
    expert[512:768] = 1
    cell = encode_cell(expert, base, F32, 256, 4)
    assert cell.coded == 256
    assert len(cell.record) == 1 + 10 + 4 * (stream_bytes(256) + CHECK_BYTES)
    raw = store(base, F32, F32)
    values = load(decode_cell(octets(cell), raw, F32, 256, 256, 4), F32, F32)
    assert not values[:512].any()
    assert not values[768:].any()


def test_deltas_that_no_float32_holds_have_no_planes_and_all_of_their_error() -> None:
    base = np.zeros(10)
    cell = encode_cell(base + 1e100, base, F64, 256, 2)
    assert (cell.record, cell.coded) == (b"", 0)
    assert cell.left == (cell.left[0],) * 3


def test_minus_zero_of_the_base_stays_where_the_delta_is_zero() -> None:
    base = np.array([-0.0] * 256 + [1.0] * 256, dtype=np.float32)
    expert = base + np.repeat(np.float32([0, 1]), 256)
    cell = encode_cell(expert, base, F32, 256, 1)
    decoded = load(decode_cell(octets(cell), store(base, F32, F32), F32, 256, cell.coded, 1), F32, F32)
    assert np.signbit(decoded[:256]).all()


def codes_in_hexadecimal() -> str:
    """Return records, errors and decoded values of a cell in each dtype."""
    found = []
    for compute in COMPUTE.values():
        expert, base = random_cell(8, 5000, compute)
        cell = encode_cell(expert, base, compute, 256, 3)
        decoded = decode_cell(octets(cell), store(base, compute, compute), compute, 256, cell.coded, 3)
        found += [cell.record.hex(), *(error.hex() for error in cell.left), decoded.tobytes().hex()]
    return " ".join(found)


def test_a_cpu_without_vectors_or_fused_multiply_add_codes_the_same(tmp_path: Path) -> None:
    code = "from test_planes import codes_in_hexadecimal; print(codes_in_hexadecimal())"
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    oldest = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX2 FMA3 AVX512F AVX512_SKX",  # those of its versions
    }
    environment = {**os.environ, "PYTHONPATH": path, **oldest}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == codes_in_hexadecimal().split()


# Records --------------------------------------------------------------------------------------------------------------


def test_the_check_of_a_prefix_finds_any_flipped_bit() -> None:
    expert, base = random_cell(3, 300, BF16)
    cell = encode_cell(expert, base, BF16, 100, 3)
    for level in (1, 2, 3):
        prefix = first_planes(octets(cell), 300, 100, cell.coded, level)
        assert prefix.is_sound()
        for bit in range(8 * prefix.data.size):
            damaged = prefix.data.copy()
            damaged[bit // 8] ^= np.uint8(1 << bit % 8)
            assert not replace(prefix, data=damaged).is_sound()


@given(seed=seeds, step=st.integers(1, 500), cells=st.integers(1, 5), group=st.integers(1, 300))
@settings(max_examples=30)
def test_the_layout_knows_the_size_of_every_prefix(seed: int, step: int, cells: int, group: int) -> None:
    size = step * cells - step // 3
    grid = BlockGrid(size, step)
    expert, base = random_cell(seed, size, F32)
    coded = [encode_cell(expert[a:z], base[a:z], F32, group, 2) for a, z in grid]
    layout = RecordLayout(grid, group, np.array([cell.coded for cell in coded]))
    assert layout.prefix_bytes(2).tolist() == [len(cell.record) for cell in coded]
    assert not layout.prefix_bytes(0).any()
    assert [int(layout.prefix_bytes(2, range(i, i + 1))[0]) for i in range(cells)] == layout.prefix_bytes(2).tolist()
    for size, cell, (start, stop) in zip(layout.prefix_bytes(1), coded, grid, strict=True):
        if cell.coded:
            prefix = first_planes(octets(cell), stop - start, group, cell.coded, 1)
            assert prefix.is_sound()
            assert prefix.data.size == size


def test_the_beginning_of_a_record_does_not_depend_on_how_many_planes_follow() -> None:
    expert, base = random_cell(4, 1000, BF16)
    one, many = (encode_cell(expert, base, BF16, 256, planes) for planes in (1, 5))
    assert many.record.startswith(one.record)
    assert many.left[:2] == one.left


# Cells and groups -----------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(1, 3000), max_size=3).map(tuple), cells=st.sampled_from([1, 2, 4, 8, 16]))
def test_cells_divide_blocks_evenly_into_whole_rows(shape: tuple[int, ...], cells: int) -> None:
    blocks, grid = BlockGrid.of(shape), cell_grid(shape, cells)
    assert grid.size == blocks.size
    assert blocks.step % grid.step == 0
    assert blocks.step // grid.step <= cells
    assert grid.step % (shape[-1] if shape else 1) == 0


def test_cells_of_usual_matrices_are_as_many_as_are_wanted() -> None:
    assert cell_grid((4096, 4096), 16).step == 4096 * 8
    assert cell_grid((151936, 896), 16).step * 15 == BlockGrid.of((151936, 896)).step
    assert cell_grid((4096,), 16) == BlockGrid(4096, 4096 * 8)


@pytest.mark.parametrize(("blocks", "cells"), [(1, 16), (8192, 16), (8193, 8), (134_000, 1), (10**6, 1)])
def test_a_model_has_a_bounded_number_of_cells(blocks: int, cells: int) -> None:
    assert cells_per_block(blocks) == cells
    assert blocks * cells <= max(MOST_CELLS, blocks)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((), 256), ((1,), 256), ((5, 3), 255), ((9, 256), 256), ((9, 500), 500), ((9, 704), 352), ((2, 4096), 512)],
)
def test_a_group_is_a_piece_of_a_row_or_some_short_rows(shape: tuple[int, ...], size: int) -> None:
    assert group_size(shape) == size


def test_states_of_books_are_all_in_use() -> None:
    assert BOOKS.shape == (PLANES, STATES)
    assert all(np.unique(book).size > STATES // 3 for book in BOOKS)
