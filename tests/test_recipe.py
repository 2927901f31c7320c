"""What a recipe may say, what it is told when it says something else, and where its models are found."""

import os
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64
from mergefs.errors import RecipeError
from mergefs.methods.contract import BasePolicy
from mergefs.methods.registry import method_names, specification
from mergefs.recipe.document import MAXIMUM_SIZE, Item, SequenceItem, TableItem, parse_documents
from mergefs.recipe.layers import layer_of, layer_position
from mergefs.recipe.model import ModelReference, Recipe, find_model, load_recipe, parse_recipe
from mergefs.recipe.parameters import Condition, Conditions, Gradient

# A busy machine must not fail a test.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TIES = """\
merge_method: ties
base_model: base
models:
  - model: math
    parameters: {weight: 0.5, density: 0.3}
  - model: code
    parameters: {weight: 0.25}
parameters:
  normalize: false
dtype: bfloat16
"""


def parse(text: str, *directories: Path) -> Recipe:
    return parse_recipe(dedent(text), "<recipe>", *directories)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return str(caught.value)


def with_line(line: str, replacement: str) -> str:
    assert TIES.count(line) == 1
    return TIES.replace(line, replacement)


# What a recipe means


LORA = ModelReference("me/lora@v1", "me/lora", "v1", None)
PLUS = ModelReference("a+b", "a+b", None, None)


def test_a_recipe_keeps_what_it_says() -> None:
    recipe = parse_recipe(TIES, "merge.yml", Path("/recipes"))
    assert recipe.method == "ties"
    assert [entry.model.path for entry in recipe.models] == ["math", "code"]
    assert recipe.models[0].parameters == {"weight": 0.5, "density": 0.3}
    assert recipe.base == ModelReference("base", "base", None, None)
    assert (recipe.dtype, recipe.out_dtype) == (BF16, None)
    assert recipe.parameters == {"normalize": False}
    assert (recipe.text, recipe.origin, recipe.directories) == (TIES, "merge.yml", (Path("/recipes"),))


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(TypeError):
        parse(TIES).parameters["normalize"] = True  # type: ignore[index]


def test_an_unlisted_base_takes_part_as_the_last_model_without_settings() -> None:
    inputs = parse(TIES).inputs()
    assert [entry.model.path for entry in inputs] == ["math", "code", "base"]
    assert inputs[-1].parameters == {}


def test_a_listed_base_keeps_its_place() -> None:
    recipe = parse(with_line("models:\n", "models:\n  - model: base\n"))
    assert [entry.model.path for entry in recipe.inputs()] == ["base", "math", "code"]
    assert recipe.inputs() == recipe.models


@pytest.mark.parametrize("prefix", ["", "torch."])
@pytest.mark.parametrize(("name", "dtype"), [("float32", F32), ("float64", F64), ("bfloat16", BF16), ("float16", F16)])
def test_dtypes_are_named_as_in_torch(prefix: str, name: str, dtype: object) -> None:
    text = with_line("dtype: bfloat16", f"dtype: {prefix}{name}\nout_dtype: {prefix}{name}")
    assert (parse(text).dtype, parse(text).out_dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("org/name", ModelReference("org/name", "org/name", None, None)),
        ("org/name@v2", ModelReference("org/name@v2", "org/name", "v2", None)),
        ("{model: org/name}", ModelReference("org/name", "org/name", None, None)),
        ("{model: org/name@v2, lora: null}", ModelReference("org/name@v2", "org/name", "v2", None)),
        ("{model: {path: org/name}}", ModelReference("org/name", "org/name", None, None)),
        ("{model: {path: org/name, revision: v2}}", ModelReference("org/name@v2", "org/name", "v2", None)),
        ("{model: {path: 'a+b@c'}}", ModelReference("a+b@c", "a+b@c", None, None)),
        ("{model: a+b}", ModelReference("a+b", "a+b", None, None)),
        ("{model: name, override_architecture: Other}", ModelReference("name", "name", None, None, "Other")),
        ("org/name@v2+me/lora@v1", ModelReference("org/name@v2+me/lora@v1", "org/name", "v2", LORA)),
        ("{model: {path: name}, lora: me/lora@v1}", ModelReference("name+me/lora@v1", "name", None, LORA)),
        (
            "{model: name, lora: {path: me/lora, revision: v1}}",
            ModelReference("name+me/lora@v1", "name", None, LORA),
        ),
        ("{model: name, lora: {path: a+b}}", ModelReference("name+a+b", "name", None, PLUS)),
    ],
)
def test_a_model_is_written_as_text_or_as_a_mapping(written: str, reference: ModelReference) -> None:
    assert parse(with_line("model: math", f"model: {written}")).models[0].model == reference
    assert parse(with_line("base_model: base", f"base_model: {written}")).base == reference


def test_every_form_of_a_parameter_is_read() -> None:
    text = """
        merge_method: ties
        base_model: base
        models:
          - model: a
            parameters:
              weight: [0, 0.5, 1]
              density:
                - filter: self_attn
                  value: [0.1, 0.9]
                - {filter: "*", value: 0.5}
                - value: 0.25
        parameters:
          weight: {filter: mlp, value: 2}
    """
    recipe = parse(text)
    assert recipe.models[0].parameters == {
        "weight": Gradient((0.0, 0.5, 1.0)),
        "density": Conditions(
            (
                Condition(Gradient((0.1, 0.9)), "self_attn"),
                Condition(0.5, "*"),
                Condition(0.25, None),
            )
        ),
    }
    assert recipe.parameters == {"weight": Conditions((Condition(2.0, "mlp"),))}


@pytest.mark.parametrize("written", ["1e-3", "'0.001'", "1.0e-3", "0.001", "' 1e-3 '"])
def test_numbers_may_be_written_as_text_since_yaml_takes_1e_3_for_text(written: str) -> None:
    value = parse(with_line("weight: 0.25", f"weight: {written}")).models[1].parameters["weight"]
    assert value == 0.001
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *((text, True) for text in ("true", "yes", "on", "1", "1.0", "'true'", "'True'")),
        *((text, False) for text in ("false", "no", "off", "0", "0.0", "'false'")),
    ],
)
def test_truth_values_have_the_spellings_that_pydantic_takes(written: str, value: bool) -> None:
    assert parse(with_line("normalize: false", f"normalize: {written}")).parameters["normalize"] is value


def test_aliases_and_merge_keys_are_followed_and_a_models_own_value_wins() -> None:
    text = """
        merge_method: ties
        base_model: base
        models:
          - model: a
            parameters: &shared {weight: 0.5, density: 0.3}
          - model: b
            parameters: *shared
          - model: c
            parameters:
              <<: *shared
              weight: 1
          - model: d
            parameters:
              <<: [{weight: 7}, *shared]
    """
    assert [dict(entry.parameters) for entry in parse(text).models] == [
        {"weight": 0.5, "density": 0.3},
        {"weight": 0.5, "density": 0.3},
        {"weight": 1.0, "density": 0.3},
        {"weight": 7.0, "density": 0.3},
    ]


def test_keys_that_are_there_without_a_value_count_as_absent() -> None:
    unset = (
        "dtype: null\nout_dtype:\nslices: null\nmodules: ~\ntokenizer: null\ntokenizer_source:\nchat_template: null\n"
    )
    text = with_line("dtype: bfloat16\n", unset).replace("{weight: 0.25}", "{weight: 0.25}\n    lora: null")
    recipe = parse(text)
    assert (recipe.dtype, recipe.out_dtype) == (None, None)


def test_per_model_parameters_may_stand_at_top_level_for_all_models() -> None:
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    assert parse(text).parameters == {"weight": 1.0}


@pytest.mark.parametrize("method", method_names())
def test_every_method_of_the_registry_is_a_merge_method(method: str) -> None:
    declared = specification(method)
    assert declared is not None
    based = declared.base is BasePolicy.REQUIRED
    document: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": f"m{i}"} for i in range(max(1, declared.min_experts, declared.min_models - based))],
        "parameters": {parameter.name: 0.5 for parameter in declared.parameters if parameter.required},
    }
    if based:
        document["base_model"] = "base"
    assert parse(yaml.safe_dump(document)).method == method


# What is refused, with the line and the remedy


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        # keys
        ("dtype: bfloat16", "dtyp: bfloat16", 10, ("'dtyp'", "did you mean 'dtype'?")),
        ("merge_method: ties", "merge-method: ties", 1, ("'merge-method'", "did you mean 'merge_method'?")),
        ("dtype: bfloat16", "dtype: bfloat16\nqqqq: 1", 11, ("'qqqq'", "the known ones are merge_method, models")),
        ("- model: math", "- modle: math", 4, ("'modle'", "did you mean 'model'?")),
        ("density: 0.3", "densitty: 0.3", 5, ("'densitty'", "not a parameter of ties", "did you mean 'density'?")),
        ("normalize: false", "normalise: false", 9, ("'normalise'", "did you mean 'normalize'?")),
        ("normalize: false", "t: 0.5", 9, ("'t' is a parameter of slerp", "ties takes ")),
        ("normalize: false", "zzz: 0.5", 9, ("'zzz' is not a parameter of ties; ties takes ", "density")),
        ("dtype: bfloat16", "dtype: bfloat16\ndtype: float32", 11, ("'dtype'", "second time, first in line 10")),
        ("{weight: 0.25}", "{weight: 0.25, weight: 1}", 7, ("'weight'", "second time, first in line 7")),
        ("normalize: false", "1: false", 9, ("a key must be text, not 1", "in quotes")),
        ("normalize: false", "? [a]\n  : 1", 9, ("a key must be text, not a list",)),
        # what is still to come
        ("model: math", "model: math+lora+more", 4, ("'math+lora+more'", "MODEL+ADAPTER", "path: PATH")),
        ("model: math", "model: math+", 4, ("'math+'", "MODEL+ADAPTER")),
        ("model: math", "model: math+lora@", 4, ("'lora@' names no revision",)),
        ("model: math", "model: {model: math, lora: [x]}", 4, ("'lora' must be text, not a list",)),
        ("model: math", "model: {model: math, lora: {revision: x}}", 4, ("an adapter's location has no path",)),
        ("model: math", "model: {model: math, lora: {paht: x}}", 4, ("'paht'", "an adapter's", "did you mean 'path'?")),
        ("- model: math", "- model: math\n    lora: x", 5, ("'lora'", "adapter")),
        # structure
        ("models:", "slices:", 4, ("'model' cannot be used here", "sources: [{")),
        ("models:", "modules:", 4, ("'modules' must be a mapping", "text_decoder")),
        ("dtype: bfloat16", "slices: [{sources: []}]", 10, ("'slices'", "'models' in line 3", "remove the other")),
        ("- model: math", "- model: math\n    layer_range: [0, 2]", 5, ("'layer_range'", "whole model", "slices:")),
        ("dtype: bfloat16", "name: [a]", 10, ("'name'", "a list", "change it")),
        ("dtype: bfloat16", "---\nmerge_method: ties", 11, ("needs a base model",)),
        # methods
        ("ties", "tise", 1, ("'tise' is not a merge_method", "did you mean 'ties'?")),
        ("ties", "zzz", 1, ("'zzz' is not a merge_method", "the known ones are linear, ")),
        ("ties", "7", 1, ("'merge_method' must be the name of a method", "`mergefs methods` lists them", "not 7")),
        ("merge_method: ties", "merge_method:", 1, ("no merge_method", "add one of linear, ")),
        # models
        ("base_model: base", "base_model:", 1, ("ties needs a base model", "`base_model: PATH`")),
        ("base_model: base", "base_model: [a]", 2, ("'base_model' must be text, not a list",)),
        ("model: math", "model: 2024", 4, ("'model' must be text, not 2024", "in quotes")),
        ("model: math", "model: 2024-01-31", 4, ("'2024-01-31' as a date", "in quotes")),
        ("model: math", "model: ''", 4, ("'model' is ''", "name a model directory")),
        ("model: math", "model:", 4, ("names no model", "`model: PATH`")),
        ("model: math", "model: a@b@c", 4, ("'a@b@c' has more than one @", "revision: REVISION")),
        ("model: math", "model: a@", 4, ("'a@' names no revision",)),
        ("model: math", "model: '@main'", 4, ("'@main' names no path",)),
        ("model: math", "model: {modle: a}", 4, ("'modle'", "did you mean 'model'?")),
        ("model: math", "model: {lora: null}", 4, ("has no model", "`model: PATH`")),
        ("model: math", "model: {model: {paht: a}}", 4, ("'paht'", "did you mean 'path'?")),
        ("model: math", "model: {model: {revision: a}}", 4, ("has no path",)),
        ("model: code", "model: math", 6, ("'math' is listed for the second time, first in line 4",)),
        ("model: code", "model: {model: {path: math}}", 6, ("'math' is listed for the second time",)),
        ("- model: code", "- code\n  - model: code", 6, ("must be a mapping, not 'code'", "`- model: PATH`")),
        # values
        ("weight: 0.25", "weight: true", 7, ("'weight' must be a number, not true",)),
        ("weight: 0.25", "weight: half", 7, ("'weight' must be a number, not 'half'",)),
        ("weight: 0.25", "weight: .nan", 7, ("'weight' must be a finite number, not nan",)),
        ("weight: 0.25", "weight: -.inf", 7, ("'weight' must be a finite number, not -inf",)),
        ("weight: 0.25", "weight: 'inf'", 7, ("'weight' must be a finite number, not 'inf'",)),
        ("weight: 0.25", "weight: 1" + "0" * 350, 7, ("'weight' must be a", "number")),
        ("weight: 0.25", "weight: 1" + "0" * 5000, 7, ("a number of 5001 digits is out of range",)),
        ("weight: 0.25", "weight: null", 7, ("'weight' has no value",)),
        ("weight: 0.25", "weight: []", 7, ("the list of 'weight' is empty",)),
        ("weight: 0.25", "weight: [1, [2]]", 7, ("a single value of 'weight' is expected here, not a list",)),
        ("weight: 0.25", "weight: [1, null]", 7, ("'weight' must be a number, not nothing",)),
        ("weight: 0.25", "weight: [1, {value: 2}]", 7, ("'weight' mixes conditions with 1",)),
        ("weight: 0.25", "weight: [{filter: mlp}]", 7, ("a condition of 'weight' has no value",)),
        ("weight: 0.25", "weight: {valeu: 1}", 7, ("'valeu'", "did you mean 'value'?")),
        ("weight: 0.25", "weight: {value: 1, filter: 3}", 7, ("a filter of 'weight' must be text", "not 3")),
        ("weight: 0.25", "weight: {value: {value: 1}}", 7, ("a single value of 'weight'", "not a mapping")),
        ("weight: 0.25", "weight: [{value: 1}, {value: [2, x]}]", 7, ("'weight' must be a number, not 'x'",)),
        ("density: 0.3", "density: -0.1", 5, ("'density' must be ", "not -0.1")),
        ("density: 0.3", "density: [0.1, -0.1]", 5, ("'density' must be ", "not -0.1")),
        ("density: 0.3", "density: {value: [0.1, '-1e-1']}", 5, ("'density' must be ", "not '-1e-1'")),
        ("normalize: false", "normalize: 2", 9, ("'normalize' must be true or false, not 2",)),
        ("normalize: false", "normalize: maybe", 9, ("'normalize' must be true or false, not 'maybe'",)),
        ("parameters:\n  normalize: false", "parameters: [1]", 8, ("'parameters' must be a mapping", "not a list")),
        ("dtype: bfloat16", "dtype: int64", 10, ("'dtype' must be one of bfloat16, float16", "not 'int64'")),
        ("dtype: bfloat16", "out_dtype: fp8", 10, ("'out_dtype' must be one of", "not 'fp8'")),
        ("dtype: bfloat16", "dtype: 16", 10, ("'dtype' must be one of", "not 16")),
        # the wrong place
        ("{weight: 0.25}", "{weight: 1, normalize: true}", 7, ("'normalize'", "'code'", "at top level")),
        # what is missing
        ("{weight: 0.25}", "{density: 0.25}", 6, ("'weight'", "for model 'code'", "of that model", "at top level")),
        # YAML
        ("weight: 0.25", "weight: !!python/name:os.system x", 7, ("tag", "python/name:os.system", "remove it")),
        ("weight: 0.25", "weight: !mine 1", 7, ("tag '!mine'", "remove it")),
        ("weight: 0.25", "weight: !!int x", 7, ("'x' is not of YAML's type int",)),
        ("weight: 0.25", "weight: *unknown", 7, ("not valid YAML", "undefined alias")),
        ("weight: 0.25", "weight: =", 7, ("in quotes",)),
        ("weight: 0.25", "<<: 3", 7, ("<< takes a mapping", "not 3")),
        ("weight: 0.25", "<<: {weight: 1}, <<: {density: 1}", 7, ("<< stands here for the second time",)),
        ("weight: 0.25}", "weight: 0.25", 8, ("not valid YAML", "column 1")),
        ("model: math", '"model": "\\UFFFFFFFF"', 4, ("out of YAML's range",)),
        ("model: math", "model: a\x07b", 4, ("character U+0007 is not allowed",)),
    ],
)
def test_a_slip_is_named_with_its_line_and_a_remedy(before: str, after: str, line: int, words: tuple[str, ...]) -> None:
    message = refusal(with_line(before, after))
    assert message.startswith(f"<recipe>:{line}: ")
    assert "\n" not in message
    for expected in words:
        assert expected in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "<recipe>: is empty"),
        ("# only a comment\n", "<recipe>: is empty"),
        ("---\n", "<recipe>: is empty"),
        ("just words", "<recipe>:1: a recipe is a mapping with merge_method and models, not 'just words'"),
        ("- a\n- b\n", "<recipe>:1: a recipe is a mapping with merge_method and models, not a list"),
        ("merge_method: linear\n", "<recipe>:1: the recipe has no models; list them under 'models'"),
        ("merge_method: linear\nmodels: []\n", "<recipe>:2: 'models' is empty"),
        ("merge_method: linear\nmodels: {a: 1}\n", "<recipe>:2: 'models' must be a list, not a mapping"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 1}\n",
            "<recipe>:3: merge_method slerp takes exactly 2 models, the base counted, and this recipe has 1 (a); add",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 1}\n",
            "<recipe>:3: merge_method slerp takes exactly 2 models, the base counted, and this recipe has 3 (b, c, a)",
        ),
        (
            'merge_method: slerp\nbase_model: a\nmodels: [{model: "b\\tc"}, {model: "\\x1b[0m"}]\nparameters: {t: 1}\n',
            "<recipe>:3: merge_method slerp takes exactly 2 models, the base counted, and this recipe has 3 "
            r"('b\tc', '\x1b[0m', a)",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n",
            "<recipe>:3: merge_method slerp needs the parameter 't'",
        ),
        (
            "merge_method: linear\nbase_model: a\nmodels:\n- model: b\n  parameters: {weight: 1}\n",
            "<recipe>:3: merge_method linear needs the parameter 'weight'",  # for a, which is not listed
        ),
    ],
)
def test_a_recipe_that_asks_for_nothing_possible_is_refused(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_aliases_that_multiply_are_refused_before_they_are_expanded() -> None:
    laughs = ["l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    laughs += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 40)]
    message = refusal("\n".join(laughs))
    assert message.startswith("<recipe>:5: ")
    assert "aliases expanded" in message


def test_merge_keys_that_multiply_are_refused_before_they_are_expanded() -> None:
    laughs = ["l0: &l0 {a: 1, b: 2}"]
    laughs += [f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 10)}]}}" for i in range(1, 40)]
    assert "aliases expanded" in refusal("\n".join(laughs))


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {<<: *x}", "&x {*x : 1}", "&x {a: [{b: *x}]}"])
def test_an_alias_inside_of_the_value_it_names_is_refused(text: str) -> None:
    assert "the alias *x stands inside of the value it names" in refusal(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "? " * 100_000])
def test_values_nested_too_deep_are_refused(text: str) -> None:
    assert "nested more than 64 deep" in refusal(text)


def test_a_long_number_in_base_60_is_refused_before_it_is_computed() -> None:
    assert "is out of range" in refusal(with_line("weight: 0.25", "weight: 1" + ":59" * 100_000))


def test_a_long_unknown_key_is_cut_short_in_the_message() -> None:
    assert len(refusal(f"? {'k' * 100_000}\n: 1\n")) < 400


KEYS = st.sampled_from(
    [
        "merge_method",
        "models",
        "model",
        "base_model",
        "dtype",
        "out_dtype",
        "parameters",
        "weight",
        "density",
        "normalize",
        "t",
        "filter",
        "value",
        "slices",
        "path",
        "revision",
        "lora",
        "tokenizer",
        "<<",
        "lambda",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=8)
    | st.sampled_from(["ties", "linear", "slerp", "a", "b@c", "a+b", "*", "float32", "1e-3", "nan", "union"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5))
MODELS = st.lists(
    st.fixed_dictionaries({"model": LEAVES}, optional={"parameters": st.dictionaries(KEYS, VALUES, max_size=3)})
    | VALUES,
    max_size=3,
)
DOCUMENTS = VALUES | st.fixed_dictionaries(
    {"merge_method": st.sampled_from([*method_names(), "tise"]), "models": MODELS},
    optional={
        "base_model": LEAVES,
        "dtype": LEAVES,
        "parameters": st.dictionaries(KEYS, VALUES, max_size=3),
        "slices": VALUES,
    },
)


def plain(item: Item) -> object:
    if isinstance(item, SequenceItem):
        return [plain(element) for element in item.items]
    if isinstance(item, TableItem):
        return {entry.key: plain(entry.value) for entry in item}
    return item.value


@UNTIMED
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    ).filter(lambda document: document is not None)
)
@example({"a": "1:30", "b": "0x1F", "c": "1_000", "d": "yes", "e": "~", "f": "1e3", "g": "<<", "h": "="})
def test_values_are_read_as_by_the_safe_loader_that_mergekit_uses(document: object) -> None:
    text = yaml.safe_dump(document, sort_keys=False)
    assert plain(parse_documents(text, "<recipe>")[0]) == yaml.safe_load(text) == document


def assert_parsed_or_refused_in_one_sentence(text: str) -> None:
    try:
        recipe = parse_recipe(text, "<recipe>")
    except RecipeError as error:
        message = str(error)
        assert message.startswith("<recipe>:")
        assert "\n" not in message
        assert len(message) < 2000
    else:
        assert recipe.text == text
        assert recipe.models


@UNTIMED
@given(DOCUMENTS)
def test_any_yaml_document_is_a_recipe_or_refused_in_one_sentence(document: object) -> None:
    assert_parsed_or_refused_in_one_sentence(yaml.dump(document, sort_keys=False))


@UNTIMED
@given(st.text(alphabet=st.characters() | st.sampled_from("\n :-[]{}&*!|>'\"%@`#,?=<")))
@example("%YAML 1.1\n--- a: b")
@example(f"%YAML 1.{'1' * 5000}\n--- a")
@example("!<tag:yaml.org,2002:bool> maybe")
@example("!!float 0x1p")
@example("!!seq a")
@example("!!map [a]")
@example("\ud800")
@example('"\\ud800": 1')
@example("merge_method: linear\nmodels: [{model: '\ufeff'}]")
@example("? ")
@example("- !!int ''")
@example("a: !!int '-'")
@example("a: !!int 1:x")
@example("a: !!float ''")
def test_any_text_is_a_recipe_or_refused_in_one_sentence(text: str) -> None:
    assert_parsed_or_refused_in_one_sentence(text)


@UNTIMED
@given(st.data())
def test_a_damaged_recipe_is_a_recipe_or_refused_in_one_sentence(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TIES)))
    end = data.draw(st.integers(start, min(len(TIES), start + 12)))
    pieces = st.sampled_from(["&a ", "*a", "<<: ", "!!int ", "[", "]", "{", "}", ": ", "- ", "\n", "'", '"', "|", "~"])
    inserted = "".join(data.draw(st.lists(pieces, max_size=4)))
    assert_parsed_or_refused_in_one_sentence(TIES[:start] + inserted + TIES[end:])


# Files


def test_a_file_is_read_with_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(TIES)
    recipe = load_recipe(path)
    assert recipe == parse_recipe(TIES, str(path), Path.cwd(), tmp_path)


def test_a_relative_path_gives_an_absolute_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merge.yml").write_text(TIES)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("merge.yml"))
    assert (recipe.origin, recipe.directories) == ("merge.yml", (tmp_path,))


def test_a_recipe_behind_a_link_is_in_both_directories(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    path, link = tmp_path / "recipes" / "merge.yml", tmp_path / "current.yml"
    path.write_text(TIES)
    link.symlink_to(path)
    assert load_recipe(link).directories == (Path.cwd(), tmp_path, tmp_path / "recipes")
    assert load_recipe(link, tmp_path).directories == (tmp_path, tmp_path / "recipes")
    (tmp_path / "recipes" / "math").mkdir()
    recipe = load_recipe(link)
    assert find_model(recipe.models[0].model, recipe) == tmp_path / "recipes" / "math"


def test_files_that_cannot_be_recipes_are_refused_by_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yml"
    latin = tmp_path / "latin.yml"
    latin.write_bytes(b"merge_method: ties\nbase_model: caf\xe9\n")
    huge = tmp_path / "huge.yml"
    with huge.open("wb") as file:
        file.truncate(MAXIMUM_SIZE + 1)
    loop = tmp_path / "loop.yml"
    loop.symlink_to(loop)
    for path, words in [
        (missing, f"{missing}: there is no such recipe"),
        (tmp_path, f"{tmp_path}: is a directory"),
        (latin, f"{latin}:2: byte 0xe9 is not UTF-8"),
        (huge, f"{huge}: is larger than 1.00 MiB"),
        (loop, f"{loop}: cannot be read"),
        (tmp_path / "nul\0", f"{tmp_path}/nul\0: cannot be read"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(words)


def test_an_error_in_a_file_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(TIES.replace("density", "densitty"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (f"{path}:5: 'densitty' is not a parameter of ties; did you mean 'density'?")


# Where models are


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory, a recipe directory, and an empty Hub cache."""
    for name in ("current", "recipes", "hub", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def located(path: str, places: Path) -> Path:
    recipe = parse(
        f"merge_method: passthrough\nmodels: [{{model: '{path}'}}]\n", places / "current", places / "recipes"
    )
    return find_model(recipe.models[0].model, recipe)


def not_found(path: str, places: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        located(path, places)
    return str(caught.value)


def cached(places: Path, name: str, reference: str, commit: str = "a1" * 20) -> Path:
    repository = places / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / reference).write_text(commit)
    return snapshot


def test_a_relative_path_counts_from_the_current_directory_first(places: Path) -> None:
    (places / "recipes" / "m").mkdir()
    assert located("./m", places) == places / "recipes" / "m"
    (places / "current" / "m").mkdir()
    assert located("m", places) == places / "current" / "m"


def test_absolute_paths_and_home_directories_are_found(places: Path) -> None:
    (places / "home" / "m").mkdir()
    assert located("~/m", places) == places / "home" / "m"
    assert located(str(places / "home" / "m"), places) == places / "home" / "m"


def test_a_path_that_is_nowhere_is_refused_with_both_places(places: Path) -> None:
    message = not_found("../models/m", places)
    assert message.count(str(places / "models" / "m")) == 1  # both directories lead to the same place
    message = not_found("./m", places)
    assert f"'{places / 'current' / 'm'}' and '{places / 'recipes' / 'm'}'" in message
    assert "hf download" not in message


def test_a_file_is_no_model_directory(places: Path) -> None:
    (places / "current" / "m.safetensors").write_bytes(b"")
    assert "is the file" in not_found("m.safetensors", places)


def test_a_directory_that_may_not_be_looked_into_is_said(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    assert "(Permission denied)" in not_found("/secret/m", places)


def test_a_path_that_no_file_system_takes_is_not_found(places: Path) -> None:
    assert "was not found" in not_found("a/" + "b" * 5000, places)


def test_a_local_directory_has_no_revisions(places: Path) -> None:
    (places / "current" / "m").mkdir()
    assert "which has no revisions; remove @v2" in not_found("m@v2", places)


def test_a_directory_with_an_at_sign_in_its_name_is_found(places: Path) -> None:
    (places / "current" / "m").mkdir()
    (places / "current" / "m@v2").mkdir()
    assert located("m@v2", places) == places / "current" / "m@v2"


def test_a_hub_name_is_found_in_the_local_cache(places: Path) -> None:
    snapshot = cached(places, "org/name", "main")
    assert located("org/name", places) == snapshot
    assert located("org/name@main", places) == snapshot
    assert located(f"org/name@{'a1' * 20}", places) == snapshot


def test_a_hub_name_without_an_organisation_is_found_in_the_local_cache(places: Path) -> None:
    snapshot = cached(places, "gpt2", "main")
    assert located("gpt2", places) == snapshot


def test_a_revision_is_found_in_the_local_cache(places: Path) -> None:
    cached(places, "org/name", "main")
    snapshot = cached(places, "org/name", "refs/pr/1", "b2" * 20)
    assert located("org/name@refs/pr/1", places) == snapshot


def test_a_local_directory_comes_before_the_cache(places: Path) -> None:
    cached(places, "org/name", "main")
    (places / "recipes" / "org" / "name").mkdir(parents=True)
    assert located("org/name", places) == places / "recipes" / "org" / "name"


def test_a_hub_name_that_is_not_cached_is_refused_with_the_command_that_gets_it(places: Path) -> None:
    message = not_found("org/name", places)
    assert str(places / "current" / "org" / "name") in message
    assert str(places / "hub") in message
    assert message.endswith("or run `hf download org/name`")
    cached(places, "org/name", "main")
    assert not_found("org/name@v2", places).endswith("or run `hf download org/name --revision v2`")


def test_a_damaged_cache_counts_as_not_cached(places: Path) -> None:
    snapshot = cached(places, "org/name", "main")
    snapshot.rmdir()
    assert "hf download org/name" in not_found("org/name", places)
    reference = places / "hub" / "models--org--name" / "refs" / "main"
    reference.write_text("../../../../etc")
    assert "hf download org/name" in not_found("org/name", places)
    reference.write_bytes(b"\xff")
    assert "hf download org/name" in not_found("org/name", places)


def test_a_revision_cannot_lead_out_of_the_cache(places: Path) -> None:
    cached(places, "org/name", "main")
    (places / "hub" / "outside").write_text("a1" * 20)
    assert "hf download org/name" in not_found("org/name@../../outside", places)


@pytest.mark.parametrize(
    ("variable", "value", "cache"),
    [
        ("HF_HUB_CACHE", "one", "one"),
        ("HUGGINGFACE_HUB_CACHE", "two", "two"),
        ("HF_HOME", "three", "three/hub"),
        ("XDG_CACHE_HOME", "four", "four/huggingface/hub"),
        ("HOME", "five", "five/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_library_keeps_it(
    places: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, cache: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(places / value))
    assert f"'{places / cache}'" in not_found("org/name", places)


# Layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.31.mlp.experts.7.w1.weight", 31),
        ("transformer.h.5.attn.c_attn.bias", 5),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
        ("layers.3", None),
        ("", None),
    ],
)
def test_the_layer_is_the_first_number_between_dots(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "layers", "position"),
    [
        ("model.layers.0.w", 5, 0.0),
        ("model.layers.1.w", 5, 0.25),
        ("model.layers.4.w", 5, 1.0),
        ("model.layers.0.w", 1, 1.0),
        ("model.layers.5.w", 5, 0.0),  # outside of the layers, whatever its name says
        ("model.layers.1.w", 1, 0.0),
        ("model.embed_tokens.weight", 5, 0.0),
        ("lm_head.weight", 1, 0.0),
        ("model.layers.3.w", None, 0.0),
    ],
)
def test_the_position_runs_from_0_to_1_over_the_layers(name: str, layers: int | None, position: float) -> None:
    assert layer_position(name, layers) == position
