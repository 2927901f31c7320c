"""Gradients, filters and precedence, held against mergekit's own answers."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    InputSliceDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
    evaluate_setting,
)
from mergekit.parameter_resolver import resolve_parameters as mergekit_resolve
from pydantic import TypeAdapter, ValidationError

from mergefs.errors import RecipeError
from mergefs.methods.contract import BasePolicy, Parameter, Scope, Specification
from mergefs.methods.registry import method_names, specification
from mergefs.recipe.model import Recipe, parse_recipe
from mergefs.recipe.parameters import (
    Condition,
    Conditions,
    Gradient,
    ResolvedParameters,
    Scalar,
    Setting,
    evaluate,
    resolve_parameters,
    unmatched_filters,
)

# A busy machine must not fail a test.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)
NAMES = st.sampled_from(TENSORS)
FILTERS = st.none() | st.sampled_from(["*", "self_attn", "mlp", "model", "layers.1.", "lm_head", "nowhere"])
POSITIONS = st.floats(0, 1) | st.builds(lambda i, n: i / n, st.integers(0, 12), st.integers(12, 80))


# One setting


@pytest.mark.parametrize(
    ("setting", "t", "value"),
    [
        (0.5, 0.7, 0.5),
        (Gradient((0.0, 1.0)), 0.25, 0.25),
        (Gradient((0.0, 1.0, 0.0)), 0.75, 0.5),
        (Gradient((0.0, 1.0)), 1.0, 1.0),
        (Gradient((0.3,)), 0.9, 0.3),
        (Gradient((True, False)), 0.99, True),
        (Gradient((True, False)), 1.0, False),
        (Gradient(("a", "b", "c")), 0.5, "b"),
        (Gradient((1, True)), 0.5, 1),  # not all are numbers: it steps
    ],
)
def test_a_gradient_of_numbers_is_interpolated_and_any_other_steps(setting: Setting, t: float, value: Scalar) -> None:
    assert evaluate(setting, "lm_head.weight", t) == value


def test_the_first_condition_that_matches_decides() -> None:
    setting = Conditions(
        (
            Condition(Gradient((0.0, 1.0)), "self_attn"),
            Condition(0.5, "layers"),
            Condition(0.25, "*"),
            Condition(9, None),
        )
    )
    assert evaluate(setting, "model.layers.0.self_attn.q_proj.weight", 0.5) == 0.5
    assert evaluate(setting, "model.layers.0.self_attn.q_proj.weight", 1.0) == 1.0
    assert evaluate(setting, "model.layers.0.mlp.up_proj.weight", 1.0) == 0.5
    assert evaluate(setting, "lm_head.weight", 1.0) == 0.25


def test_no_match_gives_nothing() -> None:
    assert evaluate(Conditions((Condition(1.0, "mlp"),)), "lm_head.weight", 0.0) is None


def mergekit_form(setting: Setting) -> Any:
    if isinstance(setting, Conditions):
        return [ConditionalParameter(value=mergekit_form(c.value), filter=c.filter) for c in setting.conditions]
    return list(setting.values) if isinstance(setting, Gradient) else setting


def settings_of(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Setting]:
    values = scalars | st.builds(Gradient, st.lists(scalars, min_size=1, max_size=6).map(tuple))
    return values | st.builds(
        Conditions, st.lists(st.builds(Condition, values, FILTERS), min_size=1, max_size=4).map(tuple)
    )


@UNTIMED
@given(settings_of(st.floats(allow_nan=False, allow_infinity=False)), NAMES, POSITIONS)
def test_numbers_come_out_as_from_mergekit_bit_for_bit(setting: Setting, name: str, t: float) -> None:
    expected = evaluate_setting(name, mergekit_form(setting), t, validate=TypeAdapter(float).validate_python)
    assert evaluate(setting, name, t) == expected


@UNTIMED
@given(
    settings_of(st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.sampled_from("abc")),
    NAMES,
    POSITIONS,
)
def test_values_of_any_kind_come_out_as_from_mergekit(setting: Setting, name: str, t: float) -> None:
    assert evaluate(setting, name, t) == evaluate_setting(name, mergekit_form(setting), t, validate=lambda value: value)


# A whole recipe

PER_MODEL_AND_PER_EXPERT = Specification(
    name="invented",
    title="",
    reference="",
    summary="",
    parameters=(
        Parameter("weight", "float", Scope.PER_EXPERT, "", required=True),
        Parameter("scale", "float", Scope.PER_MODEL, "", default=2.0),
        Parameter("lambda", "float", Scope.GLOBAL, "", default=1.0),
        Parameter("optional", "float", Scope.GLOBAL, ""),
    ),
    base=BasePolicy.REQUIRED,
)


def ties(text: str) -> Recipe:
    return parse_recipe(f"merge_method: ties\nbase_model: base\n{text}", "<recipe>")


def test_the_models_own_entry_comes_before_the_top_level_and_that_before_the_default() -> None:
    recipe = ties("models: [{model: a, parameters: {weight: 3}}, {model: b}]\nparameters: {weight: 5}\n")
    resolved = resolve_parameters(recipe, PER_MODEL_AND_PER_EXPERT, "lm_head.weight", 0.0)
    assert resolved == ResolvedParameters(
        shared={"lambda": 1.0, "optional": None},
        per_model=({"weight": 3.0, "scale": 2.0}, {"weight": 5.0, "scale": 2.0}, {"scale": 2.0}),
    )


def test_a_level_without_a_match_falls_through_to_the_next() -> None:
    recipe = ties(
        "models: [{model: a, parameters: {weight: {filter: mlp, value: 3}}}]\n"
        "parameters: {weight: [{filter: self_attn, value: 5}, {value: 7}], density: {filter: mlp, value: 0.5}}\n"
    )
    method = specification("ties")
    assert method is not None
    found = {
        name: resolve_parameters(recipe, method, f"model.layers.0.{name}.weight", 0.0).per_model[0]
        for name in ("mlp", "self_attn", "norm")
    }
    assert {name: (values["weight"], values["density"]) for name, values in found.items()} == {
        "mlp": (3.0, 0.5),
        "self_attn": (5.0, 1.0),
        "norm": (7.0, 1.0),
    }


def test_the_base_has_no_parameters_of_experts_wherever_it_is_listed() -> None:
    recipe = ties("models: [{model: base}, {model: a}]\nparameters: {weight: 1}\n")
    method = specification("ties")
    assert method is not None
    per_model = resolve_parameters(recipe, method, "lm_head.weight", 0.0).per_model
    assert per_model[0] == {}
    assert per_model[1]["weight"] == 1.0


def test_a_required_parameter_that_no_filter_gives_is_refused_with_model_parameter_tensor_and_remedy() -> None:
    recipe = ties("models: [{model: a, parameters: {weight: {filter: mlp, value: 3}}}]\n")
    method = specification("ties")
    assert method is not None
    with pytest.raises(RecipeError) as caught:
        resolve_parameters(recipe, method, "lm_head.weight", 0.0)
    assert str(caught.value) == (
        "<recipe>: the parameter 'weight' of model 'a' has no value for tensor 'lm_head.weight', because none of its "
        "filters selects that name; add a last condition without a filter, such as `- value: 1.0`, in the "
        "'parameters' of that model or at top level"
    )


def test_a_required_parameter_of_the_whole_merge_is_refused_without_a_model() -> None:
    recipe = parse_recipe(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: {filter: mlp, value: 0.5}}\n",
        "r.yml",
    )
    method = specification("slerp")
    assert method is not None
    with pytest.raises(RecipeError) as caught:
        resolve_parameters(recipe, method, "lm_head.weight", 0.0)
    assert str(caught.value).startswith("r.yml: the parameter 't' has no value for tensor 'lm_head.weight'")


def test_filters_that_select_nothing_are_told_once_and_in_order() -> None:
    recipe = ties(
        "models:\n"
        "- model: a\n"
        "  parameters: {weight: [{filter: mpl, value: 1}, {filter: mlp, value: 1}, {filter: '*', value: 1}]}\n"
        "- model: b\n"
        "  parameters: {weight: [{filter: mpl, value: 1}, {filter: attention, value: 1}, {value: 1}]}\n"
        "parameters: {density: {filter: lm_hed, value: 1}}\n"
    )
    assert unmatched_filters(recipe, iter(TENSORS)) == ("mpl", "attention", "lm_hed")


# The same recipe, read and resolved by mergekit


def written_scalars(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.kind == "bool":
        return st.sampled_from([True, False, 0, 1, "true", "False"])
    low = -1e6 if parameter.minimum is None else parameter.minimum
    high = 1e6 if parameter.maximum is None else parameter.maximum
    if parameter.kind == "int":
        integers = st.integers(int(low), int(high))
        return integers | integers.map(float) | integers.map(str)
    numbers = st.floats(low, high)
    return numbers | numbers.map(lambda number: f"{number!r}") | st.sampled_from([low, high]).map(int)


def written_settings(parameter: Parameter) -> st.SearchStrategy[Any]:
    scalars = written_scalars(parameter)
    values = scalars | st.lists(scalars, min_size=1, max_size=5)
    condition = st.fixed_dictionaries({"value": values}, optional={"filter": FILTERS})
    return values | condition | st.lists(condition, min_size=1, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(method_names()))
    method = specification(name)
    assert method is not None

    def parameters(takes: Callable[[Parameter], bool], every: bool) -> dict[str, Any]:
        return {
            parameter.name: draw(written_settings(parameter))
            for parameter in method.parameters
            if takes(parameter) and ((every and parameter.required) or draw(st.booleans()))
        }

    based = method.base is BasePolicy.REQUIRED
    based = based or (method.base is BasePolicy.OPTIONAL and draw(st.booleans()))
    least = max(1, method.min_experts, method.min_models - based)
    most = min(high for high in (3, method.max_experts, method.max_models and method.max_models - based) if high)
    experts = [f"expert-{number}" for number in range(draw(st.integers(least, most)))]
    listed = [*experts, "base"] if based and draw(st.booleans()) else experts
    models = []
    for model in listed:
        scopes = {Scope.PER_MODEL} if model == "base" else {Scope.PER_MODEL, Scope.PER_EXPERT}
        models.append({"model": model, "parameters": parameters(lambda p, s=scopes: p.scope in s, False)})  # type: ignore[misc]
    recipe = {"merge_method": name, "models": models, "parameters": parameters(lambda _: True, True)}
    if based:
        recipe["base_model"] = "base"
    return recipe


def resolved_by_mergekit(text: str, tensor_name: str, t: float) -> ResolvedParameters | None:
    """Return mergekit's answer, along the way that its planner takes, or None when it refuses."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.models is not None
    sources = [
        InputSliceDefinition(model=entry.model, layer_range=(0, 2), parameters=entry.parameters)
        for entry in config.models
    ]
    if config.base_model and config.base_model not in [source.model for source in sources]:
        sources.append(InputSliceDefinition(model=config.base_model, layer_range=(0, 2)))
    reader = ConfigReader(config=config, t=t, slice_out=OutputSliceDefinition(sources=sources))
    try:
        shared, per_input = mergekit_resolve(
            merge_methods.get(config.merge_method).spec,
            tensor_name=tensor_name,
            inputs={source.model: tensor_name for source in sources},
            sources=reader.parameter_sources,
            base_model=reader.base_model,
            t=reader.t,
        )
    except (RuntimeError, ValidationError):  # a gradient may come to half a step
        return None
    return ResolvedParameters(shared, tuple(per_input[source.model] for source in sources))


@pytest.mark.parametrize(("written", "t", "expected"), [("[2, 4]", 0.5, 3), ("[{filter: mlp, value: 7}]", 0, 7)])
def test_a_whole_number_may_be_a_gradient_or_a_condition(written: str, t: float, expected: int) -> None:
    recipe = parse_recipe(
        f"merge_method: karcher\nmodels: [{{model: a}}]\nparameters: {{max_iter: {written}}}", "r.yml"
    )
    method = specification("karcher")
    assert method is not None
    resolved = resolve_parameters(recipe, method, "model.layers.1.mlp.up_proj.weight", t)
    assert (resolved.shared["max_iter"], type(resolved.shared["max_iter"])) == (expected, int)


def test_a_gradient_that_comes_to_half_of_a_whole_number_is_refused() -> None:
    recipe = parse_recipe("merge_method: karcher\nmodels: [{model: a}]\nparameters: {max_iter: [2, 3]}", "r.yml")
    method = specification("karcher")
    assert method is not None
    with pytest.raises(RecipeError) as caught:
        resolve_parameters(recipe, method, "model.layers.1.mlp.up_proj.weight", 0.5)
    assert str(caught.value) == (
        "r.yml: the gradient of 'max_iter' comes to 2.5 for tensor 'model.layers.1.mlp.up_proj.weight', and it must be "
        "a whole number everywhere; give one number, or conditions with a filter"
    )


@UNTIMED
@given(recipes(), NAMES, POSITIONS)
def test_every_parameter_of_every_method_comes_out_as_from_mergekit(
    written: dict[str, Any], name: str, t: float
) -> None:
    text = yaml.safe_dump(written, sort_keys=False)
    recipe = parse_recipe(text, "<recipe>")
    method = specification(recipe.method)
    assert method is not None
    try:
        ours: ResolvedParameters | None = resolve_parameters(recipe, method, name, t)
    except RecipeError:
        ours = None
    expected = resolved_by_mergekit(text, name, t)
    if ours is None or expected is None:
        assert ours is expected
        return
    assert dict(ours.shared) == dict(expected.shared)
    assert [dict(values) for values in ours.per_model] == [dict(values) for values in expected.per_model]
    for values in (ours.shared, *ours.per_model):
        kinds = {key: type(value) for key, value in values.items() if value is not None}
        assert all(kind is KINDS[method_kind(method, key)] for key, kind in kinds.items())


KINDS = {"float": float, "int": int, "bool": bool}


def method_kind(method: Specification, name: str) -> str:
    parameter = method.parameter(name)
    assert parameter is not None
    return parameter.kind
