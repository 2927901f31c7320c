"""The fused kernels of single methods equal the reference bit for bit, for any coefficients and any data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import assert_equals_reference, by_dtype, factors, random_inputs, seeds

from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.kernels.sums import LaneSums
from mergefs.methods.arcee_fusion import ArceeFusion, ArceeFusionCoefficients
from mergefs.methods.contract import (
    Answer,
    Answers,
    Block,
    ElementNorms,
    ElementSums,
    Quantity,
    RawRun,
    SingleSums,
    Statistic,
    TensorContext,
    Threshold,
)
from mergefs.methods.karcher import Karcher, KarcherCoefficients, Pull, Step
from mergefs.methods.masks import KeepAll, KeepRandom, KeepRanked
from mergefs.methods.model_stock import ModelStock, ModelStockCoefficients
from mergefs.methods.multislerp import Multislerp, MultislerpCoefficients
from mergefs.methods.nearswap import NearSwap, NearSwapCoefficients
from mergefs.methods.nuslerp import Nuslerp, NuslerpCoefficients, Turn
from mergefs.methods.ram import Ram, RamCoefficients, RamPlus
from mergefs.methods.sce import Sce, SceCoefficients, SelectAll, Selected, SelectNone
from mergefs.methods.task_vector import DELLA, DELLA_LINEAR, ExpertCoefficients, TaskVectorCoefficients


def assert_fused_terms_are_the_formulas(
    wanted: Statistic, inputs: tuple[tuple[Raw, DType], ...], dtype: DType, start: int
) -> None:
    """Assert that the compiled way to the terms of a quantity leads to those of its formula; NaN is NaN."""
    assert isinstance(wanted, Quantity)
    assert wanted.fused is not None
    block = Block(tuple(load(inputs[model][0], dtype, dtype) for model in wanted.models), start)
    with np.errstate(all="ignore"):
        found, expected = (way(block, Precision(dtype)) for way in (wanted.fused, wanted.terms))
    np.testing.assert_array_equal(found, expected)


def assert_sums_are_those_of_the_terms(
    wanted: Statistic, inputs: tuple[tuple[Raw, DType], ...], dtype: DType, start: int
) -> None:
    """Assert that what a compiled pass adds up of a block are the lanes of the terms that the formula gives."""
    assert isinstance(wanted, Quantity)
    assert wanted.lanes is not None
    raws = tuple(inputs[model][0] for model in wanted.models)
    block = Block(tuple(load(raw, dtype, dtype) for raw in raws), start)
    with np.errstate(all="ignore"):
        terms = np.atleast_2d(wanted.terms(block, Precision(dtype)))
        found = wanted.lanes(RawRun(raws, dtype, start))
        expected = LaneSums.begin(len(terms)).add(terms)
        np.testing.assert_array_equal(LaneSums(found, terms.shape[1]).finish(), expected.finish())


@st.composite
def karcher_coefficients(draw: st.DrawFn, dtype: DType) -> KarcherCoefficients:
    """Return coefficients for two to five inputs, some of which have no direction, and any number of steps."""
    precision = Precision(dtype)
    positive = st.floats(1e-3, 1e3).map(lambda value: float(np.float32(value)))

    def rounded(value: float) -> float:
        with np.errstate(all="ignore"):
            return float(precision.scalar(value))

    models = tuple(sorted(draw(st.sets(st.integers(0, 4), min_size=1))))
    number = st.floats(-2, 2).map(rounded)
    pulls = st.lists(
        st.builds(Pull, st.integers(0, len(models) - 1), number, number.filter(bool)),
        max_size=len(models),
        unique_by=lambda pull: pull.direction,
    ).map(lambda found: tuple(sorted(found, key=lambda pull: pull.direction)))
    whole = st.builds(Step, pulls, positive, number, number, st.none() | positive)
    begun = st.builds(Step, pulls)
    steps = (*draw(st.lists(whole, max_size=4)), *draw(st.lists(begun, max_size=1)))
    starts_with_first = draw(st.booleans())
    return KarcherCoefficients(
        models=models,
        norms=tuple(draw(positive) for _ in models),
        share=draw(st.floats(0.1, 1)),
        starts_with_first=starts_with_first,
        mean_norm=None if starts_with_first else draw(st.none() | positive),
        steps=steps,
        radius=draw(positive),
    )


@by_dtype
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=seeds, size=st.integers(1, 3000))
def test_any_karcher_mean_equals_the_reference(dtype: DType, data: st.DataObject, seed: int, size: int) -> None:
    coefficients = data.draw(karcher_coefficients(dtype))
    assert_equals_reference(Karcher(), coefficients, random_inputs(seed, 5, size, dtype), dtype)


def rounded_factors(dtype: DType) -> st.SearchStrategy[float]:
    """Return numbers of the recipe, or of statistics, rounded to the compute dtype."""

    def rounded(value: float) -> float:
        with np.errstate(all="ignore"):
            return float(Precision(dtype).scalar(value))

    return factors.map(rounded)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 4),
    row=st.integers(1, 700),
    rows=st.integers(1, 5),
    first_row=st.integers(0, 2**20),
    seed=seeds,
)
def test_any_survival_by_rank_equals_the_reference(
    dtype: DType, data: st.DataObject, count: int, row: int, rows: int, first_row: int, seed: int
) -> None:
    experts = []
    for model in range(1, count + 1):
        density = data.draw(st.floats(0.1, 0.9))
        epsilon = data.draw(st.floats(0, 1)) * min(density, 1 - density)
        mask = KeepRanked(data.draw(st.integers(0, 2**64 - 1)), row, density, epsilon)
        other = data.draw(st.sampled_from((KeepAll(), KeepRandom(5, 2**23))))
        rescale = data.draw(st.none() | st.floats(0.5, 4).map(lambda value: float(np.float32(value))))
        chosen = mask if data.draw(st.booleans()) or model == 1 else other
        experts.append(ExpertCoefficients(model, chosen, rescale, data.draw(rounded_factors(dtype))))
    consensus = data.draw(st.booleans())
    divisor = None if consensus else data.draw(rounded_factors(dtype))
    coefficients = TaskVectorCoefficients(0, tuple(experts), consensus, data.draw(st.booleans()), divisor, None)
    inputs = random_inputs(seed, count + 1, rows * row, dtype)
    assert_equals_reference(DELLA, coefficients, inputs, dtype, first_row * row)


@by_dtype
@pytest.mark.parametrize("spread", [1, 3, 2000])
def test_rows_of_every_kind_are_ranked_as_the_reference_ranks_them(dtype: DType, spread: int) -> None:
    """Keys in a few bins and all over the range, many of them equal, with and without zeros; of rows that are long."""
    generator = np.random.default_rng(spread)
    row = 70_000
    steps = generator.integers(-spread, spread + 1, (4, row)) * 2.0**-12
    values = np.concatenate([steps.ravel(), steps.ravel() + 3, generator.standard_normal(row) * 1e-30])
    raws = [store(Precision(dtype).round(part.astype(np.float32)), dtype, dtype) for part in (values, values * 0)]
    mask = KeepRanked(7, row, 0.5, 0.25)
    coefficients = TaskVectorCoefficients(1, (ExpertCoefficients(0, mask, None, 1.0),), False, False, None, None)
    assert_equals_reference(DELLA_LINEAR, coefficients, tuple((raw, dtype) for raw in raws), dtype)


def test_rows_that_are_ranked_stay_whole_where_inputs_are_converted() -> None:
    row = 50_000
    coefficients = TaskVectorCoefficients(
        0, (ExpertCoefficients(1, KeepRanked(3, row, 0.4, 0.2), 2.0, 0.5),), True, True, None, None
    )
    inputs = random_inputs(11, 2, 3 * row, F32)
    assert_equals_reference(DELLA, coefficients, inputs, BF16, out=F16)


@by_dtype
@settings(max_examples=25, deadline=None)
@given(row=st.integers(1, 300), rows=st.integers(1, 5), first_row=st.integers(0, 1000), seed=seeds)
def test_what_ranks_keep_is_summed_as_by_the_formula(
    dtype: DType, row: int, rows: int, first_row: int, seed: int
) -> None:
    parameters = {"weight": 0.5, "density": 0.5, "epsilon": 0.2, "normalize": True, "rescale": True, "lambda": 1.0}
    size = rows * row
    context = TensorContext("w", size, row, row, dtype, 0, 2, parameters, (parameters,) * 2, seed)
    (wanted,) = DELLA.statistics(context)
    assert_sums_are_those_of_the_terms(wanted, random_inputs(seed, 2, size, dtype), dtype, first_row * row)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(t=factors, swapped=st.booleans(), seed=seeds, size=st.integers(1, 3000))
def test_any_nearswap_equals_the_reference(dtype: DType, t: float, swapped: bool, seed: int, size: int) -> None:
    coefficients = NearSwapCoefficients(int(swapped), int(not swapped), t)
    assert_equals_reference(NearSwap(), coefficients, random_inputs(seed, 2, size, dtype), dtype)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), seed=seeds, size=st.integers(1, 3000))
def test_any_ram_equals_the_reference(dtype: DType, data: st.DataObject, count: int, seed: int, size: int) -> None:
    order = data.draw(st.permutations(range(count + 1)))
    epsilon = data.draw(st.sampled_from([0.0, 2.0**-20, 2.0**-6, 1.0]) | rounded_factors(dtype))
    coefficients = RamCoefficients(order[0], tuple(order[1:]), epsilon)
    assert_equals_reference(Ram(), coefficients, random_inputs(seed, count + 1, size, dtype), dtype)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), seed=seeds, size=st.integers(1, 3000))
def test_any_boosted_ram_equals_the_reference(
    dtype: DType, data: st.DataObject, count: int, seed: int, size: int
) -> None:
    order = data.draw(st.permutations(range(count + 1)))
    epsilon = data.draw(st.sampled_from([0.0, 2.0**-20, 2.0**-6, 1.0]) | rounded_factors(dtype))
    boosts = tuple(float(np.float32(data.draw(st.floats(0.5, 2)))) for _ in range(count))
    coefficients = RamCoefficients(order[0], tuple(order[1:]), epsilon, boosts)
    out = data.draw(st.sampled_from([dtype, F32]))
    assert_equals_reference(RamPlus(), coefficients, random_inputs(seed, count + 1, size, dtype), dtype, out=out)


@by_dtype
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), epsilon=st.sampled_from([0.0, 2.0**-20, 0.5]), seed=seeds, size=st.integers(1, 3000))
def test_changes_alone_and_with_others_are_those_of_the_formula(
    dtype: DType, count: int, epsilon: float, seed: int, size: int
) -> None:
    parameters = {"r": 0.1, "alpha": 0.2, "epsilon": epsilon}
    context = TensorContext("w", size, size, 1, dtype, 0, count + 1, parameters, ({},) * (count + 1), 0)
    (wanted,) = RamPlus().statistics(context)
    assert_sums_are_those_of_the_terms(wanted, random_inputs(seed, count + 1, size, dtype), dtype, 0)


def selections(dtype: DType) -> st.SearchStrategy[Selected]:
    """Return any selection; thresholds lie anywhere, those of variances that occur among them."""
    precision = Precision(dtype)
    met = [int(key) for key in precision.order_keys(np.array([0, 2**-24, 2**-10, 1, np.inf, np.nan], np.float32))]
    keys = st.integers(0, 2**precision.order_bits - 1) | st.sampled_from(met)
    thresholds = st.builds(Threshold, keys, st.integers(0, 2**40) | st.integers(990, 4000))
    return st.just(SelectAll()) | st.just(SelectNone()) | thresholds


@by_dtype
@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 5),
    seed=seeds,
    size=st.integers(1, 3000),
    start=st.sampled_from([0, 1000, 2**33 + 7]),
)
def test_any_sce_equals_the_reference(
    dtype: DType, data: st.DataObject, count: int, seed: int, size: int, start: int
) -> None:
    order = data.draw(st.permutations(range(count + 1)))
    weights = tuple(data.draw(rounded_factors(dtype)) for _ in range(count))
    coefficients = SceCoefficients(order[0], tuple(order[1:]), data.draw(selections(dtype)), weights)
    assert_equals_reference(Sce(), coefficients, random_inputs(seed, count + 1, size, dtype), dtype, start)


@by_dtype
@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), seed=seeds, size=st.integers(1, 3000))
def test_what_sce_asks_is_computed_as_by_the_formula(
    dtype: DType, data: st.DataObject, count: int, seed: int, size: int
) -> None:
    parameters = {"select_topk": 0.5}
    context = TensorContext("w", size, size, 1, dtype, 0, count + 1, parameters, ({},) * (count + 1), 0)
    inputs = random_inputs(seed, count + 1, size, dtype)
    (varying,) = Sce().statistics(context)
    assert_sums_are_those_of_the_terms(varying, inputs, dtype, 0)
    answers: dict[Statistic, Answer] = {varying: float(size)}
    (variance,) = Sce().further_statistics(context, Answers(answers)) or (None,)
    if variance is None:  # half of one element is none
        return
    assert_fused_terms_are_the_formulas(variance, inputs, dtype, 0)
    limit = data.draw(selections(dtype).filter(lambda selected: isinstance(selected, Threshold)))
    assert isinstance(limit, Threshold)
    (energies,) = Sce().further_statistics(context, Answers(answers | {variance: limit}))
    assert_sums_are_those_of_the_terms(energies, inputs, dtype, 995)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(2, 5), seed=seeds, size=st.integers(1, 3000))
def test_any_model_stock_equals_the_reference(
    dtype: DType, data: st.DataObject, count: int, seed: int, size: int
) -> None:
    order = data.draw(st.permutations(range(count + 1)))
    coefficients = ModelStockCoefficients(order[0], tuple(order[1:]), 1, data.draw(rounded_factors(dtype)))
    assert_equals_reference(ModelStock(), coefficients, random_inputs(seed, count + 1, size, dtype), dtype)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data(), based=st.booleans(), straight=st.booleans(), seed=seeds, size=st.integers(1, 3000))
def test_any_nuslerp_equals_the_reference(
    dtype: DType, data: st.DataObject, based: bool, straight: bool, seed: int, size: int
) -> None:
    order = data.draw(st.permutations(range(2 + based)))
    kind = Precision(dtype).carrier
    first, second, divisor = (np.array([data.draw(rounded_factors(dtype))], dtype=kind) for _ in range(3))
    turn = Turn(first, second, divisor, np.array([straight]))
    base = order[2] if based else None
    coefficients = NuslerpCoefficients(base, (order[0], order[1]), data.draw(st.floats(-1, 2)), 1, turn)
    assert_equals_reference(Nuslerp(), coefficients, random_inputs(seed, 2 + based, size, dtype), dtype)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(2, 5), based=st.booleans(), seed=seeds, size=st.integers(1, 3000))
def test_any_multislerp_equals_the_reference(
    dtype: DType, data: st.DataObject, count: int, based: bool, seed: int, size: int
) -> None:
    order = data.draw(st.permutations(range(count + based)))
    number = rounded_factors(dtype)

    def numbers() -> tuple[float, ...]:
        return tuple(data.draw(number) for _ in range(count))

    coefficients = MultislerpCoefficients(
        base=order[count] if based else None,
        models=tuple(order[:count]),
        weights=numbers(),
        lengths=numbers(),
        mean_norm=data.draw(st.none() | number.filter(bool)),
        projections=numbers(),
        ahead=data.draw(number),
        aside=data.draw(number),
        radius=data.draw(number),
    )
    assert_equals_reference(Multislerp(), coefficients, random_inputs(seed, count + based, size, dtype), dtype)


@by_dtype
@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(2, 5), based=st.booleans(), seed=seeds, size=st.integers(1, 3000))
def test_what_multislerp_asks_is_computed_as_by_the_formula(
    dtype: DType, data: st.DataObject, count: int, based: bool, seed: int, size: int
) -> None:
    models = count + based
    weight = {"weight": 0.5}
    parameters = ({"weight": 0.3}, *(weight,) * (models - 1))
    shared = {"normalize_weights": True, "eps": 1e-8}
    context = TensorContext("w", size, size, 1, dtype, 0 if based else None, models, shared, parameters, 0)
    inputs = random_inputs(seed, models, size, dtype)
    answers: dict[Statistic, Answer] = {}
    wanted = Multislerp().statistics(context)
    compiled = 0
    while wanted:
        (one,) = wanted
        assert isinstance(one, ElementNorms | ElementSums | SingleSums)
        if one.fused is not None:
            assert_fused_terms_are_the_formulas(one, inputs, dtype, 0)
            compiled += 1
        answers[one] = np.array([data.draw(st.floats(0.1, 4)) for _ in range(one.count)])
        wanted = Multislerp().further_statistics(context, Answers(answers))
    assert compiled == 3


@by_dtype
@settings(max_examples=50, deadline=None)
@given(
    row=st.integers(1, 900),
    rows=st.integers(1, 6),
    start=st.integers(0, 2000),
    threshold=factors,
    swapped=st.booleans(),
    seed=seeds,
    to_f32=st.booleans(),
)
def test_any_arcee_fusion_equals_the_reference(
    dtype: DType, row: int, rows: int, start: int, threshold: float, swapped: bool, seed: int, to_f32: bool
) -> None:
    generator = np.random.default_rng(seed)
    size = rows * row - min(start, rows * row - 1)
    with np.errstate(all="ignore"):
        divergences = Precision(dtype).round(generator.standard_normal(-(-(start + size) // row)).astype(np.float32))
        limit = float(Precision(dtype).scalar(threshold))
    coefficients = ArceeFusionCoefficients(int(swapped), int(not swapped), row, divergences.astype(np.float64), limit)
    inputs = random_inputs(seed, 2, size, dtype)
    assert_equals_reference(ArceeFusion(), coefficients, inputs, dtype, start, F32 if to_f32 else dtype)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(row=st.integers(1, 300), rows=st.integers(1, 5), first_row=st.integers(0, 3), seed=seeds)
def test_what_arcee_fusion_asks_is_computed_as_by_the_formula(
    dtype: DType, row: int, rows: int, first_row: int, seed: int
) -> None:
    context = TensorContext("w", (first_row + rows) * row, row, row, dtype, 0, 2, {}, ({}, {}), 0)
    generator = np.random.default_rng(seed)
    whole = random_inputs(seed, 2, rows * row, dtype)
    with np.errstate(all="ignore"):
        near = load(whole[0][0], dtype, dtype) * generator.uniform(0.9, 1.1, rows * row).astype(np.float32)
        close = (whole[0], (store(Precision(dtype).round(near), dtype, dtype), dtype))
    for inputs in (whole, close):
        (rows_asked,) = ArceeFusion().statistics(context)
        assert_fused_terms_are_the_formulas(rows_asked, inputs, dtype, first_row * row)
        divergences = generator.standard_normal(first_row + rows)
        quartiles = ArceeFusion().further_statistics(context, Answers({rows_asked: divergences}))
        assert len(quartiles) == 3
        assert_fused_terms_are_the_formulas(quartiles[0], inputs, dtype, first_row * row)
