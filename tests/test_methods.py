"""The arithmetic that methods are made of, and what every registered method promises."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import Families, FamilyKind
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from recipes import Merge, recipe_document, write_document

import mergefs
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, FLOAT_DTYPES_BY_TORCH_NAME, DType
from mergefs.kernels.arithmetic import fused_multiply_add
from mergefs.kernels.precision import Array, Precision, load, round_to_bfloat16_bits, store
from mergefs.kernels.random import UNIFORM_BITS, bernoulli_limit, stream_key, uniform_integers
from mergefs.methods.contract import NO_ANSWERS, BasePolicy, Method, Scope, TensorContext
from mergefs.methods.registry import METHODS, method_names, specification
from mergefs.methods.task_vector import KeepRandom, TaskVectorCoefficients

FLOATS = (BF16, F16, F32, F64)
FLOAT_TYPES = pytest.mark.parametrize("kind", [np.float32, np.float64])

Kind = type[np.float32] | type[np.float64]


# Fused multiply-add


def fused(value: float, factor: float, addend: float, kind: Kind) -> float:
    """Return ``value * factor + addend`` by the kernel."""
    with np.errstate(all="ignore"):
        result = fused_multiply_add(np.array([value], dtype=kind), factor, np.array([addend], dtype=kind))
    assert result.dtype == kind
    return float(result[0])


def rounded(value: Fraction, kind: Kind) -> float:
    """Return the number of ``kind`` next to an exact value, by the definition of IEEE 754: ties to even."""
    bits, smallest = (24, -149) if kind is np.float32 else (53, -1074)
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, smallest)
    result = round(magnitude / unit) * unit  # round of a Fraction is to even
    infinite = result >= Fraction(2) ** (128 if kind is np.float32 else 1024)
    return math.copysign(math.inf if infinite else float(result), value)


def numbers(kind: Kind) -> st.SearchStrategy[float]:
    """Return finite numbers of all sizes, and some that lie close together, so that sums cancel and ties happen."""
    anything = st.floats(width=32 if kind is np.float32 else 64, allow_nan=False, allow_infinity=False)
    near_one = st.builds(math.ldexp, st.integers(-(2**24) + 1, 2**24 - 1), st.integers(-40, 10))
    return anything | near_one


def assert_fused_is_exact(value: float, factor: float, addend: float, kind: Kind) -> None:
    exact = Fraction(value) * Fraction(factor) + Fraction(addend)
    assert fused(value, factor, addend, kind) == rounded(exact, kind)


@given(value=numbers(np.float32), factor=numbers(np.float32), addend=numbers(np.float32))
@example(1 + 2.0**-23, 1 + 2.0**-23, -1.0)
@example(1.0, 1.0, 2.0**-24)  # a tie, to even
@example(1 + 2.0**-23, 1.0, 2.0**-24)  # a tie, the other way
@example(1.0, 1.0, 2.0**-24 + 2.0**-47)  # just above a tie: rounding twice would miss it
@example(2.0**-149, 0.5, 0.0)  # half of the smallest number
@example(2.0**-149, 0.5, 2.0**-149)
@example(2.0**127, 2.0, -(2.0**127))  # the product alone would overflow
@example(2.0**-100, 2.0**-100, 1.0)
def test_float32_is_rounded_once(value: float, factor: float, addend: float) -> None:
    assert_fused_is_exact(value, factor, addend, np.float32)


def tame(value: float) -> bool:
    """Return whether products of two such numbers have halves that float64 holds exactly."""
    return value == 0 or 2.0**-400 < abs(value) < 2.0**400


@given(value=numbers(np.float64), factor=numbers(np.float64), addend=numbers(np.float64))
@example(1 + 2.0**-52, 1 + 2.0**-52, -1.0)
@example(1.0, 1.0, 2.0**-53)
@example(1 + 2.0**-52, 1.0, 2.0**-53)
@example(1 + 2.0**-30, 1 + 2.0**-30, 2.0**-120)
@example(1.0, 1 + 2.0**-52, 2.0**-53 + 2.0**-105)
def test_float64_is_rounded_once(value: float, factor: float, addend: float) -> None:
    assume(tame(value) and tame(factor) and tame(addend))
    assert_fused_is_exact(value, factor, addend, np.float64)


@FLOAT_TYPES
@given(data=st.data())
def test_fused_multiply_add_near_cancellation_is_rounded_once(kind: Kind, data: st.DataObject) -> None:
    value, factor = (data.draw(numbers(kind).filter(tame)) for _ in range(2))
    with np.errstate(over="ignore"):
        product = kind(value) * kind(factor)
    assume(np.isfinite(product) and tame(float(product)))
    near = float(np.nextafter(-product, kind(data.draw(st.sampled_from([-math.inf, math.inf])))))
    for addend in (float(-product), near):
        assert_fused_is_exact(value, factor, addend, kind)


@FLOAT_TYPES
@pytest.mark.parametrize(
    ("value", "factor", "addend", "expected"),
    [
        (math.inf, 1.0, 0.0, math.inf),
        (math.inf, -1.0, 0.0, -math.inf),
        (math.inf, 0.0, 0.0, math.nan),
        (math.inf, 1.0, -math.inf, math.nan),
        (1.0, 1.0, -math.inf, -math.inf),
        (math.nan, 1.0, 0.0, math.nan),
        (1.0, 1.0, math.nan, math.nan),
        (1.0, math.nan, 0.0, math.nan),
    ],
)
def test_infinities_and_nan_come_out_as_ieee_754_says(
    kind: Kind, value: float, factor: float, addend: float, expected: float
) -> None:
    found = fused(value, factor, addend, kind)
    assert math.isnan(found) if math.isnan(expected) else found == expected


@FLOAT_TYPES
def test_what_outgrows_the_type_is_infinite(kind: Kind) -> None:
    largest = float(np.finfo(kind).max)
    assert fused(largest, 1.0, largest, kind) == math.inf
    assert fused(-largest, 2.0, 0.0, kind) == -math.inf
    assert fused(largest, 1.0, 0.0, kind) == largest


@FLOAT_TYPES
@pytest.mark.parametrize(
    ("value", "factor", "addend"), [(-0.0, 1.0, -0.0), (-0.0, 1.0, 0.0), (0.0, -1.0, -0.0), (1.0, 1.0, -1.0)]
)
def test_zeros_have_the_sign_that_ieee_754_gives_them(kind: Kind, value: float, factor: float, addend: float) -> None:
    assert math.copysign(1, fused(value, factor, addend, kind)) == math.copysign(1, value * factor + addend)


@FLOAT_TYPES
def test_torch_accumulates_with_the_same_fused_multiply_add(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    values: Array = generator.standard_normal(100_000).astype(kind)
    addend: Array = generator.standard_normal(100_000).astype(kind)
    total = torch.from_numpy(addend.copy())
    total.addcmul_(torch.from_numpy(values), torch.tensor(0.37, dtype=total.dtype))
    assert np.array_equal(total.numpy(), fused_multiply_add(values, 0.37, addend))


# Casts and rounding


def every_pattern(dtype: DType) -> torch.Tensor:
    """Return all 65,536 values of a 16 bit type."""
    patterns = torch.from_numpy(np.arange(65_536, dtype=np.uint16).view(np.int16))
    return patterns.view(getattr(torch, dtype.torch_name))


def samples(dtype: DType) -> torch.Tensor:
    """Return every value of a 16 bit type; of a wider one values of all sizes and ties between narrower types."""
    if dtype.bits == 16:
        return every_pattern(dtype)
    generator = np.random.default_rng(1)
    width = dtype.bits
    patterns = generator.integers(0, 2**width, 200_000, dtype=f"u{width // 8}").view(f"f{width // 8}")
    ties = [
        (every_pattern(narrow).double() + torch.exp2(torch.tensor(float(e)))).numpy()
        for narrow in (BF16, F16)
        for e in (-26, -12, -9, 4)
    ]
    everyday = generator.standard_normal(100_000)
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.concatenate([patterns, *(t.astype(patterns.dtype) for t in [*ties, everyday])]))


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy()


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits, but that NaN may be any NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    equal = first.view(integers) == second.view(integers)
    return bool((equal | (first.isnan() & second.isnan())).all())


@pytest.mark.parametrize("target", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", FLOATS, ids=lambda dtype: dtype.name)
def test_every_cast_is_the_cast_of_torch(source: DType, target: DType) -> None:
    values = samples(source)
    expected = values.to(getattr(torch, target.torch_name))
    with np.errstate(all="ignore"):
        loaded = load(raw_bytes(values), source, target)
        stored = store(load(raw_bytes(values), source, source), source, target)
    assert loaded.dtype == Precision(target).carrier
    assert same_values(torch.from_numpy(stored).view(expected.dtype), expected)
    assert same_values(torch.from_numpy(store(loaded, target, target)).view(expected.dtype), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_loading_and_storing_in_one_dtype_changes_no_bit(dtype: DType) -> None:
    values = samples(dtype)
    values = values[~values.isnan()]
    assert np.array_equal(store(load(raw_bytes(values), dtype, dtype), dtype, dtype), raw_bytes(values))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("operation", [np.add, np.subtract, np.multiply, np.divide], ids=lambda f: f.__name__)
def test_operations_of_16_bit_types_round_as_those_of_torch(dtype: DType, operation: Any) -> None:
    kind = getattr(torch, dtype.torch_name)
    first = every_pattern(dtype)
    second = first[torch.randperm(first.numel(), generator=torch.Generator().manual_seed(2))]
    by_torch: Callable[..., torch.Tensor] = getattr(torch, operation.__name__)
    expected = by_torch(first, second)
    with np.errstate(all="ignore"):
        result = Precision(dtype).round(operation(first.float().numpy(), second.float().numpy()))
    assert same_values(torch.from_numpy(result).to(kind), expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_float32_is_rounded_to_bfloat16_as_by_torch(patterns: list[int]) -> None:
    values = np.array(patterns, dtype=np.uint32).view(np.float32)
    rounded_bits = torch.from_numpy(round_to_bfloat16_bits(values).view(np.int16)).view(torch.bfloat16)
    assert same_values(rounded_bits, torch.from_numpy(values.copy()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@given(value=st.floats(-1e6, 1e6) | st.sampled_from([0.1, 1 / 3, 65504.0, 65520.0, 1e-8, 6e-8]))
def test_a_number_of_the_recipe_becomes_what_torch_makes_of_it(dtype: DType, value: float) -> None:
    found = float(Precision(dtype).scalar(value))
    assert found == float(torch.tensor(value, dtype=getattr(torch, dtype.torch_name)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
def test_a_number_of_the_recipe_that_is_too_large_becomes_infinite_without_a_warning(dtype: DType) -> None:
    assert float(Precision(dtype).scalar(-1e300)) == -math.inf


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
def test_magnitude_keys_order_as_the_magnitudes_do(dtype: DType) -> None:
    values = samples(dtype)
    values = values[~values.isnan()]
    precision = Precision(dtype)
    carried = load(raw_bytes(values), dtype, dtype)
    keys = precision.magnitude_keys(carried)
    order = np.argsort(keys, kind="stable")
    magnitudes = np.abs(carried)[order]
    assert (np.diff(magnitudes[np.isfinite(magnitudes)]) >= 0).all()
    assert np.array_equal(keys[order][1:] == keys[order][:-1], magnitudes[1:] == magnitudes[:-1])
    assert int(keys.max()) < 2**precision.key_bits
    assert np.array_equal(keys, precision.magnitude_keys(-carried))


# Random masks


@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40), count=st.integers(0, 300), cut=st.integers(0, 300))
def test_a_draw_depends_on_its_place_and_on_nothing_else(key: int, start: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = uniform_integers(key, start, count)
    parts = [uniform_integers(key, start, cut), uniform_integers(key, start + cut, count - cut)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.size == count


def split_mix(key: int, element: int) -> int:
    """Return the draw of one element, in Python's own integers, by the definition of SplitMix64."""
    mask = 2**64 - 1
    state = (key + (element + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return (state ^ (state >> 31)) >> (64 - UNIFORM_BITS)


@given(key=st.integers(0, 2**64 - 1), element=st.integers(0, 2**50))
def test_draws_are_those_of_split_mix_64(key: int, element: int) -> None:
    assert int(uniform_integers(key, element, 1)[0]) == split_mix(key, element)


def test_split_mix_64_gives_its_published_sequence() -> None:
    """The first output for the seed 1234567, as Java's SplittableRandom and the reference C code have it."""
    assert split_mix(1234567, 0) == 6457827717110365317 >> 40


def chi_square(counts: NDArray[np.int64]) -> float:
    """Return how many standard deviations the statistic lies above what uniform counts give."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("key", [0, 1, stream_key(0, 1, "model.norm.weight")])
def test_draws_are_uniform_in_their_high_and_low_bits_and_do_not_follow_each_other(key: int) -> None:
    draws = uniform_integers(key, 0, 2**20).astype(np.int64)
    assert chi_square(np.bincount(draws >> (UNIFORM_BITS - 10), minlength=1024)) < 5
    assert chi_square(np.bincount(draws & 1023, minlength=1024)) < 5
    coarse = draws >> (UNIFORM_BITS - 5)
    assert chi_square(np.bincount(coarse[1:] << 5 | coarse[:-1], minlength=1024)) < 5


def test_seed_model_and_tensor_each_make_another_stream() -> None:
    keys = {stream_key(s, m, t) for s in (0, 1, -1, 2**40) for m in range(4) for t in ("a", "b", "ä", "")}
    assert len(keys) == 4 * 4 * 4
    first, second = (uniform_integers(stream_key(0, model, "lm_head.weight"), 0, 2**18) for model in (0, 1))
    correlation = float(np.corrcoef(first, second)[0, 1])
    assert abs(correlation) < 5 / math.sqrt(first.size)
    assert stream_key(0, 1, "lm_head.weight") == stream_key(2**64, 1, "lm_head.weight")


@given(st.floats(0, 1))
@example(0.0)
@example(1.0)
@example(2.0**-24)
@example(0.7)
def test_a_draw_is_kept_exactly_when_it_lies_below_the_probability(probability: float) -> None:
    limit = bernoulli_limit(probability)
    assert 0 <= limit <= 2**UNIFORM_BITS
    assert limit == 0 or Fraction(limit - 1, 2**UNIFORM_BITS) < Fraction(probability)
    assert Fraction(limit, 2**UNIFORM_BITS) >= Fraction(probability)


# What methods promise


Planned = Callable[..., TensorContext]


@pytest.fixture
def planned(tmp_path: Path, families: Families) -> Planned:
    """Return a function that plans a merge by a method, of two experts where it takes them, and gives a context of it.

    Parameters that are not given have their defaults, or 0.5 where there is none.
    """

    def plan(method: Method[Any], compute: DType = BF16, **given_values: float | bool) -> TensorContext:
        specified = method.specification
        values: dict[str, Any] = {p.name: 0.5 for p in specified.parameters if p.default is None} | given_values
        shared = {p.name: values[p.name] for p in specified.parameters if p.scope is Scope.GLOBAL and p.name in values}
        own = {p.name: values[p.name] for p in specified.parameters if p.name in values.keys() - shared.keys()}
        with_base = specified.base is BasePolicy.REQUIRED
        count = min((specified.max_models or 3) - with_base, 2)
        merge = Merge(specified.name, (own,) * count, shared, with_base)
        recipe = write_document(
            tmp_path / "recipe.yml", recipe_document(merge, families(FamilyKind()), dtype=compute.torch_name)
        )
        with mergefs.open(recipe) as model:
            context = model.plan.tensors["lm_head.weight"].context
        assert context is not None
        return context

    return plan


def test_the_registry_knows_the_methods_by_the_names_that_recipes_use() -> None:
    names = {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough"}
    assert names <= set(method_names())
    assert all(METHODS[name].specification.name == name for name in method_names())
    assert specification("ties") is METHODS["ties"].specification
    assert specification("tie") is None


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_declares_parameters_that_a_recipe_can_be_checked_against(method: Method[Any]) -> None:
    specified = method.specification
    assert specified.title
    assert specified.summary.endswith(".")
    assert specified.reference.startswith("https://")
    names = [parameter.name for parameter in specified.parameters]
    assert len(set(names)) == len(names)
    for parameter in specified.parameters:
        assert specified.parameter(parameter.name) is parameter
        assert parameter.meaning
        assert not parameter.required or parameter.default is None
        if parameter.default is not None:
            assert isinstance(parameter.default, bool) is (parameter.kind == "bool")
    assert specified.parameter("no such") is None
    assert specified.min_models <= (specified.max_models or specified.min_models)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear", "dare_ties", "passthrough"])
def test_methods_that_know_all_from_the_recipe_ask_for_no_statistics(planned: Planned, name: str) -> None:
    assert METHODS[name].statistics(planned(METHODS[name], density=0.5)) == ()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES_BY_TORCH_NAME.values(), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 0.9999])
def test_a_random_mask_keeps_what_torch_would_keep_at_that_density(
    planned: Planned, dtype: DType, density: float
) -> None:
    """torch compares with the probability in bfloat16 where it merges in that, and in float32 everywhere else."""
    method = METHODS["dare_linear"]
    coefficients = method.coefficients(planned(method, dtype, density=density), NO_ANSWERS)
    assert isinstance(coefficients, TaskVectorCoefficients)
    mask = coefficients.experts[0].mask
    assert isinstance(mask, KeepRandom)
    kind = torch.bfloat16 if dtype == BF16 else torch.float32
    probability = Fraction(float(torch.tensor(density, dtype=kind)))
    assert Fraction(mask.limit - 1, 2**UNIFORM_BITS) < probability <= Fraction(mask.limit, 2**UNIFORM_BITS)
