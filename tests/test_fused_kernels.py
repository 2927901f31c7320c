"""The fused kernels equal the numpy reference bit for bit, for every bit pattern; the reference is the definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    assert_equals_reference,
    by_dtype,
    elements,
    factors,
    random_bytes,
    random_inputs,
    seeds,
)
from kernel_processes import run_python
from safetensors.torch import save_file

from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.engine.compute import convert, run_kernel
from mergefs.kernels.fused import FUSED_DTYPES, prepare
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.methods.arcee_fusion import ArceeFusion, ArceeFusionCoefficients
from mergefs.methods.contract import Block, RowValues, TensorContext, Threshold
from mergefs.methods.karcher import Karcher, KarcherCoefficients, Pull, Step
from mergefs.methods.linear import Linear, LinearCoefficients
from mergefs.methods.model_stock import ModelStock, ModelStockCoefficients
from mergefs.methods.multislerp import Multislerp, MultislerpCoefficients
from mergefs.methods.nearswap import NearSwap, NearSwapCoefficients
from mergefs.methods.nuslerp import Nuslerp, NuslerpCoefficients, Turn
from mergefs.methods.ram import Ram, RamCoefficients, RamPlus
from mergefs.methods.registry import METHODS
from mergefs.methods.sce import Sce, SceCoefficients
from mergefs.methods.slerp import Slerp, SlerpCoefficients
from mergefs.methods.task_vector import (
    DELLA,
    TIES,
    ExpertCoefficients,
    KeepAll,
    KeepLargest,
    KeepNone,
    KeepRandom,
    KeepRanked,
    Mask,
    TaskVectorCoefficients,
)
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.pair import TensorPair
from mergefs.statistics.thresholds import magnitude_histogram


def masks(dtype: DType) -> st.SearchStrategy[Mask]:
    """Return any mask; thresholds lie anywhere, those that are met among them."""
    keys = st.integers(0, 2 ** Precision(dtype).key_bits - 1) | st.sampled_from(
        [int(key) for key in Precision(dtype).magnitude_keys(np.array([0, 2**-24, 2**-10, 1, np.inf], np.float32))]
    )
    thresholds = st.builds(Threshold, keys, st.integers(0, 2**40) | st.integers(990, 4000))
    return st.one_of(
        st.just(KeepAll()),
        st.just(KeepNone()),
        st.builds(KeepLargest, thresholds, st.none() | thresholds),
        st.builds(KeepRandom, st.integers(0, 2**64 - 1), st.integers(0, 2**24)),
    )


@st.composite
def task_vector_coefficients(draw: st.DrawFn, dtype: DType) -> TaskVectorCoefficients:
    """Return coefficients for one to six experts, in any order, the base among them."""
    precision = Precision(dtype)

    def rounded(value: float) -> float:
        with np.errstate(all="ignore"):
            return float(precision.scalar(value))

    count = draw(st.integers(1, 6))
    order = draw(st.permutations(range(count + 1)))
    experts = tuple(
        ExpertCoefficients(
            model,
            draw(masks(dtype)),
            draw(st.none() | factors.map(lambda value: float(np.float32(value)))),
            rounded(draw(factors)),
        )
        for model in order[1:]
    )
    consensus = draw(st.booleans())
    return TaskVectorCoefficients(
        base=order[0],
        experts=experts,
        consensus=consensus,
        normalize=draw(st.booleans()),
        divisor=None if consensus else rounded(draw(factors)),
        scale=draw(st.none() | factors),
    )


@by_dtype
@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=seeds, size=st.integers(1, 3000), start=st.sampled_from([0, 1, 1000, 2**33 + 7]))
def test_any_task_vector_merge_equals_the_reference(
    dtype: DType, data: st.DataObject, seed: int, size: int, start: int
) -> None:
    coefficients = data.draw(task_vector_coefficients(dtype))
    inputs = random_inputs(seed, len(coefficients.experts) + 1, size, dtype)
    assert_equals_reference(TIES, coefficients, inputs, dtype, start)


powers_of_two = st.builds(lambda exponent, sign: sign * 2.0**exponent, st.integers(-149, 127), st.sampled_from((1, -1)))
"""All of float32: by the least and the greatest of them sums become infinite, or vanish."""


@by_dtype
@settings(max_examples=120, deadline=None)
@given(
    weights=st.lists(factors, min_size=1, max_size=10),
    divisor=st.none() | factors.filter(lambda value: value != 0) | powers_of_two,
    seed=seeds,
    size=st.integers(1, 5000),
)
def test_any_weighted_average_equals_the_reference(
    dtype: DType, weights: list[float], divisor: float | None, seed: int, size: int
) -> None:
    singles = tuple(float(np.float32(weight)) for weight in weights)
    coefficients = LinearCoefficients(singles, None if divisor is None else float(np.float32(divisor)))
    assert_equals_reference(Linear(), coefficients, random_inputs(seed, len(weights), size, dtype), dtype)


@by_dtype
@settings(max_examples=60, deadline=None)
@given(first=factors, second=factors, swapped=st.booleans(), seed=seeds, size=st.integers(1, 5000))
def test_any_spherical_interpolation_equals_the_reference(
    dtype: DType, first: float, second: float, swapped: bool, seed: int, size: int
) -> None:
    coefficients = SlerpCoefficients(
        int(swapped), int(not swapped), float(np.float32(first)), float(np.float32(second))
    )
    assert_equals_reference(Slerp(), coefficients, random_inputs(seed, 2, size, dtype), dtype)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("factor", (1.0, 0.7, 1 / 3, 1 + 2**-9, 2.0**-9, 257.0))
def test_every_16_bit_pattern_is_read_rounded_and_written_as_by_the_reference(dtype: DType, factor: float) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    zeros = np.zeros(2**17, dtype=np.uint8)
    coefficients = SlerpCoefficients(0, 1, float(np.float32(factor)), 1.0)
    assert_equals_reference(Slerp(), coefficients, ((every, dtype), (zeros, dtype)), dtype)


@by_dtype
@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=seeds, cut=st.integers(1, 2999))
def test_where_a_run_is_cut_changes_nothing(dtype: DType, data: st.DataObject, seed: int, cut: int) -> None:
    coefficients = data.draw(task_vector_coefficients(dtype))
    inputs = random_inputs(seed, len(coefficients.experts) + 1, 3000, dtype)
    whole = run_kernel(TIES, coefficients, inputs, dtype, dtype, 500)
    byte = cut * dtype.itemsize
    # The second part of a 16 bit type may begin at an address that is no multiple of the cache line, or of 4.
    parts = [
        run_kernel(TIES, coefficients, tuple((raw[:byte], d) for raw, d in inputs), dtype, dtype, 500),
        run_kernel(TIES, coefficients, tuple((raw[byte:], d) for raw, d in inputs), dtype, dtype, 500 + cut),
    ]
    np.testing.assert_array_equal(elements(np.concatenate(parts), dtype), elements(whole, dtype))


@by_dtype
def test_bytes_at_odd_addresses_and_read_only_bytes_are_merged(dtype: DType) -> None:
    coefficients = LinearCoefficients((0.3, 0.7), 1.0)
    inputs = random_inputs(3, 2, 2500, dtype)
    shifted = tuple((np.frombuffer(b"\0" + raw.tobytes(), dtype=np.uint8)[1:], stored) for raw, stored in inputs)
    expected = run_kernel(Linear(), coefficients, inputs, dtype, dtype, 0, fused=False)
    merged = run_kernel(Linear(), coefficients, shifted, dtype, dtype, 0)
    np.testing.assert_array_equal(elements(merged, dtype), elements(expected, dtype))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    stored=st.lists(st.sampled_from([BF16, F16, F32, F64]), min_size=2, max_size=2),
    compute=st.sampled_from([BF16, F16, F32, F64]),
    out=st.sampled_from([BF16, F16, F32, F64]),
    seed=seeds,
)
def test_inputs_and_outputs_of_other_dtypes_are_converted_as_for_the_reference(
    data: st.DataObject, stored: list[DType], compute: DType, out: DType, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    inputs = tuple(
        (
            random_bytes(generator, 700, dtype) if dtype != F64 else generator.standard_normal(700).view(np.uint8),
            dtype,
        )
        for dtype in stored
    )
    expert = ExpertCoefficients(1, data.draw(masks(compute)), None, 0.5)
    coefficients = TaskVectorCoefficients(0, (expert,), True, True, None, 1.5)
    assert_equals_reference(TIES, coefficients, inputs, compute, 3, out)


@pytest.mark.parametrize("stored", (BF16, F16, F32, F64), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("compute", (BF16, F16, F32, F64), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("out", (BF16, F32), ids=lambda dtype: dtype.name)
def test_blocks_that_no_method_touches_are_converted_as_the_reference_loads_and_stores(
    stored: DType, compute: DType, out: DType
) -> None:
    generator = np.random.default_rng(8)
    if stored.bits == 16:
        raw = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    elif stored == F32:
        # Any bits; NaN with every payload that rounding could carry into the sign; the neighbourhood of float16's ends.
        near = np.array([6e-8, 6.1e-5, 65504, 65520, 3.39e38], np.float32).view(np.uint32)[:, None] + np.arange(-40, 40)
        edges = np.concatenate([np.arange(0x7FFFFF00, 0x7FFFFFFF), near.ravel()]).astype(np.uint32)
        raw = np.concatenate([random_bytes(generator, 5000, F32), edges.view(np.uint8)])
    else:
        raw = (generator.standard_normal(5000) * 10.0 ** generator.uniform(-50, 50, 5000)).view(np.uint8)
    with np.errstate(all="ignore"):
        expected = store(load(raw, stored, compute), compute, out)
    np.testing.assert_array_equal(elements(convert(raw, stored, compute, out), out), elements(expected, out))


def test_a_merge_without_experts_is_its_base() -> None:
    ((raw, dtype),) = random_inputs(5, 1, 100, BF16)
    coefficients = TaskVectorCoefficients(0, (), True, True, None, None)
    assert run_kernel(TIES, coefficients, ((raw, dtype),), BF16, BF16, 0).tobytes() == raw.tobytes()


def test_an_empty_run_gives_no_bytes() -> None:
    empty: Raw = np.empty(0, dtype=np.uint8)
    assert run_kernel(Linear(), LinearCoefficients((1.0,), None), ((empty, F32),), F32, F32, 0).size == 0


@by_dtype
@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(1, 9000))
def test_the_fused_histogram_counts_what_the_reference_counts(
    dtype: DType, seed: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = np.random.default_rng(seed)
    torch_dtype = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}
    places = []
    for stored in (dtype, dtype if generator.random() < 0.7 else F32):
        directory = tmp_path_factory.mktemp("model")
        tensor = torch.from_numpy(random_bytes(generator, size, stored)).view(torch_dtype[stored])
        save_file({"weight": tensor}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        checkpoint = open_checkpoint(directory)
        places.append(StoredTensor.of(checkpoint, "weight"))
    reader = SourceReader(Ledger())
    try:
        pair = TensorPair(places[0], places[1], dtype, reader)
        with np.errstate(all="ignore"):
            expected = magnitude_histogram(pair, fused=False)
        np.testing.assert_array_equal(magnitude_histogram(pair), expected)
        assert expected.sum() == size
    finally:
        reader.close()


def merges_in_hexadecimal() -> str:
    """Return the bytes of one merge by each kernel in each dtype."""
    merged = []
    for dtype in FUSED_DTYPES:
        inputs = random_inputs(17, 3, 1500, dtype)
        mask = KeepRandom(99, 2**23)
        experts = (ExpertCoefficients(1, KeepAll(), None, 0.5), ExpertCoefficients(2, mask, 2.0, 0.25))
        ties = TaskVectorCoefficients(0, experts, True, True, None, 0.75)
        linear = LinearCoefficients((0.1, 0.2, 0.7), 1.0)
        steps = (Step((Pull(0, 0.5, 0.75), Pull(2, 0.25, 0.5)), 0.7, 0.875, 0.5, 1.1), Step((Pull(1, 0.5, 0.75),)))
        small = np.array([2**-8], dtype=np.float32)
        turn = Turn(np.float32([0.5]), np.float32([0.25]), np.float32([0.75]), np.array([False]))
        weights, lengths, projections = (0.5, 0.25, 0.25), (1.25, 0.75, 1.5), (0.875, 1.0, 0.75)
        multislerp = MultislerpCoefficients(None, (0, 1, 2), weights, lengths, 0.875, projections, 0.75, 1.5, 1.25)
        karcher = KarcherCoefficients((0, 1, 2), (1.3, 0.9, 1.7), 1 / 3, False, 1.2, steps, 2.7)
        for method, coefficients in (
            (TIES, ties),
            (Linear(), linear),
            (Slerp(), SlerpCoefficients(0, 1, 0.3, 0.6)),
            (Karcher(), karcher),
            (NearSwap(), NearSwapCoefficients(0, 1, 0.01)),
            (Ram(), RamCoefficients(0, (1, 2), 0.0078125)),
            (ModelStock(), ModelStockCoefficients(0, (1, 2), 1, 0.625)),
            (Nuslerp(), NuslerpCoefficients(2, (0, 1), 0.3, 1, turn)),
            (Multislerp(), multislerp),
            (DELLA, replace(ties, experts=(ExpertCoefficients(1, KeepRanked(5, 150, 0.5, 0.25), None, 0.5),))),
            (Sce(), SceCoefficients(0, (1, 2), Threshold(Precision(dtype).order_keys(small)[0], 700), (0.75, 0.25))),
            (RamPlus(), RamCoefficients(0, (1, 2), 0.0078125, (1.25, 0.875))),
            (ArceeFusion(), ArceeFusionCoefficients(0, 1, 500, np.array([0.5, 2, 1, 0.25]), 0.125)),
        ):
            raw = run_kernel(method, coefficients, inputs, dtype, dtype, 10)
            merged.append(elements(raw, dtype).tobytes().hex())
        values = Block(tuple(load(raw, dtype, dtype) for raw, _ in inputs[:2]), 0)
        context = TensorContext("w", 1500, 150, 150, dtype, 0, 2, {}, ({}, {}), 0)
        (divergences,) = ArceeFusion().statistics(context)
        assert isinstance(divergences, RowValues)
        assert divergences.fused is not None
        merged.append(divergences.fused(values, Precision(dtype)).tobytes().hex())
    return " ".join(merged)


def test_a_cpu_without_vectors_of_512_bits_or_fused_multiply_add_or_float16_gives_the_same_bytes(
    tmp_path: Path,
) -> None:
    code = "from test_fused_kernels import merges_in_hexadecimal; print(merges_in_hexadecimal())"
    oldest = run_python(code, tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert oldest.split() == merges_in_hexadecimal().split()


def test_what_was_prepared_is_not_compiled_again_when_it_is_called() -> None:
    from mergefs.kernels.fused.conversion import KERNEL

    prepare((), (), [(BF16, F32), (F32, BF16)])
    before = KERNEL.specialisations
    convert(store(np.ones(1000, dtype=np.float32), F32, BF16), BF16, F32, BF16)
    assert KERNEL.specialisations == before


def test_dtypes_that_have_no_fused_kernel_are_passed_over_by_prepare() -> None:
    prepare(Slerp().kernels(), [F64, F32], [(F64, F32), (F32, F32)])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_kernels_that_there_are(name: str) -> None:
    prepare(METHODS[name].kernels(), [F32])
    assert bool(METHODS[name].kernels()) == (name != "passthrough")


def test_the_registry_of_methods_does_not_import_numba(tmp_path: Path) -> None:
    code = "import sys, mergefs.methods.registry, mergefs.engine.compute; print('numba' in sys.modules)"
    assert run_python(code, tmp_path) == "False\n"
