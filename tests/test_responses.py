"""What methods tell the planner of how a merge answers to its inputs, beyond what the contract suite holds them to."""

import math

import numpy as np
import pytest

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.kernels.precision import Precision, store
from mergefs.methods.contract import NO_ANSWERS, Response, Scope, TensorContext
from mergefs.methods.registry import METHODS
from mergefs.methods.rounding import Analysis, largest_number, smallest_change, unit_roundoff
from mergefs.testing.answers import gather
from mergefs.testing.cases import Case

SIZE = 40_000


def case_of(name: str, compute: DType = F32, *, experts: int = 2, shared: object = None, **per_model: float) -> Case:
    """Return a family of fine-tuned tensors of SIZE elements, the base last, and what a method is told of them."""
    method = METHODS[name]
    generator = np.random.default_rng(5)
    base = 0.05 * generator.standard_normal(SIZE)
    models = [base + 0.01 * generator.standard_normal(SIZE) for _ in range(experts)] + [base]
    carrier = Precision(compute).carrier
    raws = tuple(store(Precision(compute).round(values.astype(carrier)), compute, compute) for values in models)
    values = {p.name: p.default for p in method.specification.parameters} | dict(shared or {})  # type: ignore[call-overload]
    of_models = {p.name for p in method.specification.parameters if p.scope is not Scope.GLOBAL}
    own = {name: per_model.get(name, values[name]) for name in of_models}
    context = TensorContext(
        name="weight",
        size=SIZE,
        row=200,
        columns=200,
        compute=compute,
        base=experts,
        models=experts + 1,
        shared={name: value for name, value in values.items() if name not in of_models},
        per_model=tuple(dict(own) for _ in raws),
        seed=0,
    )
    return Case(context, (SIZE // 200, 200), raws, ("weights",) * len(raws))


def response_of(case: Case, name: str) -> Response:
    return METHODS[name].response(case.context, gather(METHODS[name], case)[0])


FIXED = {
    "linear": ({}, {"weight": 0.5}),
    "task_arithmetic": ({}, {"weight": 0.5}),
    "dare_linear": ({}, {"weight": 0.5, "density": 0.3}),
    "slerp": ({"t": 0.3}, {}),
    "nuslerp": ({"nuslerp_flatten": True}, {"weight": 0.5}),
    "multislerp": ({}, {"weight": 0.5}),
    "karcher": ({}, {}),
    "model_stock": ({}, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_who_is_linear_with_known_factors_says_so_and_nobody_else(name: str) -> None:
    shared, own = FIXED.get(name, ({"t": 0.1}, {"weight": 0.5, "density": 0.5}))
    experts = 1 if name in ("slerp", "nearswap", "arcee_fusion") else 0 if name == "passthrough" else 2
    found = response_of(case_of(name, experts=experts, shared=shared, **own), name)
    assert found.fixed is (name in FIXED or name == "passthrough")
    assert not found.fixed or found.rounding is not None
    bounded = found.fixed or name in ("breadcrumbs", "della_linear", "nearswap", "arcee_fusion")
    assert (found.largest is not None) is bounded


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "dare_ties"])
def test_factor_and_spread_of_a_random_mask_are_those_of_the_energy_that_it_keeps(
    name: str, density: float, rescale: bool
) -> None:
    settings = {"rescale": rescale, "normalize": False, "lambda": 0.8}
    case = case_of(name, F64, experts=1, shared=settings, weight=0.6, density=density, epsilon=0.05)
    found = response_of(case, name)
    method = METHODS[name]
    expert, base = case.values().inputs
    merged = method.reference(case.values(), method.coefficients(case.context, gather(method, case)[0]), case.precision)
    delta = expert - base
    energy = float(delta @ delta)
    assert found.factors[0] == pytest.approx(float((merged - base) @ delta) / energy, rel=0.05)
    kept = float((merged - base) @ (merged - base)) / energy
    assert found.factors[0] ** 2 + found.spreads[0] == pytest.approx(kept, rel=0.05)
    if name != "dare_ties":
        assert found.largest is not None
        assert found.largest[0] == pytest.approx(np.abs((merged - base)[delta != 0] / delta[delta != 0]).max())


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_a_pruned_delta_is_expected_to_keep_the_energy_of_its_largest_elements(density: float) -> None:
    case = case_of("ties", experts=1, shared={"normalize": False}, weight=1.0, density=density)
    found = response_of(case, "ties")
    expert, base = case.values().inputs
    delta = np.sort(np.abs(expert - base))[::-1]
    kept = float((delta[: int(density * SIZE)] ** 2).sum() / (delta**2).sum())
    assert found.factors[0] ** 2 + found.spreads[0] == pytest.approx(kept, rel=0.03)


def test_columns_with_angles_of_their_own_have_factors_that_vary() -> None:
    case = case_of("nuslerp", shared={"nuslerp_flatten": False, "nuslerp_row_wise": True}, weight=0.5)
    method = METHODS["nuslerp"]
    found = response_of(case, "nuslerp")
    coefficients = method.coefficients(case.context, gather(method, case)[0])
    factors = coefficients.turn.first / coefficients.turn.divisor
    assert factors.size == 200
    assert found.factors[0] == pytest.approx(float(factors.mean()))
    assert found.spreads[0] == pytest.approx(float(factors.var()))
    assert not found.fixed


def test_what_weights_leave_of_the_base_is_the_offset() -> None:
    case = case_of("linear", shared={"normalize": False}, weight=0.25)
    found = response_of(case, "linear")
    assert found.factors == (0.25, 0.25, 0.0)
    assert found.offset == -0.25
    normalized = response_of(case_of("linear", weight=0.25), "linear")
    assert normalized.offset == 0
    assert normalized.factors == pytest.approx((1 / 3, 1 / 3, 0))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("compute", [BF16, F16, F32, F64], ids=lambda dtype: dtype.name)
def test_what_has_no_finite_factor_is_no_more_than_an_estimate(name: str, compute: DType) -> None:
    experts = 1 if name in ("slerp", "nearswap", "arcee_fusion") else 0 if name == "passthrough" else 2
    case = case_of(name, compute, experts=experts, shared={"t": 1e308, "lambda": 1e308}, weight=1e308, scale=1e308)
    with np.errstate(all="ignore"):
        found = response_of(case, name)
    assert all(map(math.isfinite, (*found.factors, *found.spreads, found.offset)))
    if found.fixed:
        assert found.rounding is not None
        assert all(map(math.isfinite, (*found.rounding.noise, *found.rounding.peaks)))


# The analysis of roundings


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=lambda dtype: dtype.name)
def test_the_limits_of_dtypes_are_those_of_rounding(dtype: DType) -> None:
    precision = Precision(dtype)
    wide = np.longdouble
    assert precision.scalar(1 + unit_roundoff(dtype) if dtype != F64 else 1.0) == 1  # a tie, to even
    above = 1 + 3 * unit_roundoff(dtype)
    assert wide(precision.scalar(above)) - 1 == 4 * wide(unit_roundoff(dtype))
    assert precision.scalar(largest_number(dtype)) == largest_number(dtype)
    if dtype != F64:
        assert precision.scalar(largest_number(dtype) * (1 + unit_roundoff(dtype))) == math.inf
        assert precision.scalar(smallest_change(dtype)) == 0
        assert precision.scalar(2 * smallest_change(dtype)) == 2 * smallest_change(dtype)


def test_rounding_adds_a_half_unit_for_each_operation() -> None:
    analysis = Analysis(2, 1, BF16)
    delta = analysis.delta(0)
    once = unit_roundoff(BF16) + unit_roundoff(F32)
    assert delta.noise[0] == pytest.approx(once, rel=1e-2)
    twice = analysis.rounded(delta * 0.5)
    assert twice.factors[0] == 0.5
    assert twice.noise[0] == pytest.approx(once, rel=1e-2)  # of half the size: two roundings
    result = analysis.rounding(analysis.base() + twice, 0.0)
    assert result is not None
    assert result.base_noise == 0
    assert result.peaks[0] >= 1
    assert result.base_peak == 1


def test_a_merge_of_the_base_alone_is_not_rounded() -> None:
    context = case_of("task_arithmetic", weight=1.0).context
    found = METHODS["task_arithmetic"].response(context, NO_ANSWERS)
    assert found.rounding is not None
    assert found.rounding.base_noise == 0
