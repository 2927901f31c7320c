"""Configs in the forms that people write them: each gives what mergekit gives, or says what to change.

Every text is the smallest one that shows a habit of model cards and scripts.
"""

import contextlib
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import Family
from examples import Families, FamilyKind
from mounting import run_mergefs
from oracle import mergekit_merge, mergekit_multi, nothing_left_to_chance
from tensors import Tensors, differing

import mergefs
from mergefs.errors import RecipeError

BF16 = torch.bfloat16
LAYERS = 4

SAME: dict[str, str] = {
    "sources first, gradients by filter, and the type last": """\
slices:
  - sources:
      - model: {a}
        layer_range: [0, 4]
      - model: {b}
        layer_range: [0, 4]
merge_method: slerp
base_model: {a}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # for the rest
dtype: bfloat16

""",
    "a gradient of more values than there are layers": """\
models: [{{model: {a}}}, {{model: {b}}}]
merge_method: slerp
base_model: {a}
parameters:
  t: [0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5, 0.3, 0.7]
""",
    "gradients with comments, and a filter that leaves nothing to the rest": """\
models:
  - model: {a}
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: {b}
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: {c}
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: {base}
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "a listed base with parameters, and truth values as numbers": """\
merge_method: dare_ties
base_model: {base}
models:
  - model: {base}
    parameters: {{weight: 0.2, density: 0.3}}
  - model: {a}
    parameters: {{weight: 0.2}}
#  - model: {b}
parameters:
  density: 0.53
  normalize: 1.0
  int8_mask: 1
""",
    "written by a search: keys in alphabetical order, slices one by one": """\
base_model: {base}
dtype: bfloat16
merge_method: task_arithmetic
parameters:
  int8_mask: 1.0
  lambda: 0.5676097213578511
  normalize: 0.0
slices:
- sources:
  - layer_range: [0, 2]
    model: {a}
    parameters:
      weight: 0.36
  - layer_range: [0, 2]
    model: {base}
- sources:
  - layer_range: [2, 4]
    model: {b}
    parameters:
      weight: -0.12
  - layer_range: [2, 4]
    model: {base}
""",
    "a merge of the base alone": """\
base_model: {base}
merge_method: task_arithmetic
slices:
- sources:
  - layer_range: [0, 4]
    model: {base}
    parameters:
      weight: 1.0
""",
    "numbers in quotes, and numbers that YAML takes for text": """\
models:
  - model: {a}
    parameters: {{weight: "0.7"}}
  - model: {b}
    parameters: {{weight: '3e-1'}}
  - model: {c}
    parameters: {{weight: 1e-1}}
merge_method: linear
parameters: {{normalize: "true"}}
dtype: "float32"
out_dtype: 'bfloat16'
""",
    "YAML 1.1's numbers and truth values": """\
models:
  - model: {a}
    parameters: {{weight: .5}}
  - model: {b}
    parameters: {{weight: +0.25}}
merge_method: linear
parameters: {{normalize: No}}
dtype: torch.float32
""",
    "ranges of layers as text and as numbers with a point": """\
slices:
  - sources:
    - model: {a}
      layer_range: ["0", "3"]
  - sources:
    - model: {b}
      layer_range:
        - 1.0
        - 4
merge_method: passthrough
""",
    "scales that repeat layers without effect": """\
merge_method: passthrough
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}]
- sources:
  - model: {a}
    layer_range: [1, 3]
    parameters:
      scale:
        - {{filter: o_proj, value: 0.0}}
        - {{filter: down_proj, value: 0.0}}
        - value: 1.0
- sources: [{{model: {a}, layer_range: [2, 4]}}]
  residual_weight: 0.5
""",
    "a base for each slice": """\
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2]}}
      - {{model: {b}, layer_range: [2, 4]}}
    base_model: {a}
    parameters: {{t: 0.5}}
  - sources:
      - {{model: {a}, layer_range: [2, 4]}}
      - {{model: {b}, layer_range: [0, 2]}}
    base_model: {b}
    parameters: {{t: [0.5, 0.1]}}
merge_method: slerp
""",
    "a module called default": """\
base_model: {base}
merge_method: breadcrumbs
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: {a}
        parameters:
          density: 0.5
          weight: [0.9, 0.2, 0.2, 0.2, 0.95, 0.8, 0.4, 0.2]
      - layer_range: [0, 4]
        model: {base}
parameters:
  gamma: 0.01
""",
    "the memory of masks set where there are no masks": """\
models:
  - model: {a}
    parameters: {{int8_mask: true}}
  - model: {b}
merge_method: model_stock
base_model: {base}
parameters:
  int8_mask: true
""",
    "a list of one value": """\
models:
  - model: {a}
    parameters: {{weight: [0.5]}}
  - model: {b}
    parameters: {{weight: [0.7]}}
base_model: {base}
merge_method: multislerp
parameters:
  normalize_weights: false
  eps: 1e-8
""",
    "anchors kept in a key of their own": """\
.settings: &settings
  density: 0.5
  weight: 0.4
x-models: [&first {a}]
models:
  - model: *first
    parameters: *settings
  - model: {b}
    parameters:
      <<: *settings
      weight: 0.2
merge_method: ties
base_model: {base}
""",
    "references in the long form": """\
models:
  - model:
      model: {{path: {a}}}
    parameters: {{weight: 0.5}}
  - model: {{model: {{path: {b}, revision: null}}, lora: null, override_architecture: null}}
    parameters: {{weight: 0.5}}
merge_method: linear
""",
    "every key that is not set": """\
modules: null
slices:
models:
  - model: {a}
    parameters:
  - model: {b}
    parameters: ~
merge_method: linear
base_model: null
parameters:
  weight: 1
tokenizer: null
tokenizer_source:
chat_template: null
out_dtype: ~
dtype: null
""",
    "a condition alone, and all tensors by a star": """\
models:
  - model: {a}
    parameters:
      weight:
        - filter: "*"
          value: 0.3
  - model: {b}
    parameters:
      weight: {{filter: mlp, value: 0.2}}
merge_method: linear
parameters:
  weight: [1, 0]
""",
    "a name for a single document, between two marks": """\
%YAML 1.1
---
name: some-8B-name
models:
  - {{model: {a}, parameters: {{weight: 1}}}}
  - {{model: {b}, parameters: {{weight: 2}}}}
merge_method: linear
---
""",
    "line ends of Windows": (
        "merge_method: linear\r\nmodels:\r\n  - model: {a}\r\n    parameters:\r\n      weight: 1\r\ndtype: float32\r\n"
    ),
    "a byte order mark": "\ufeffmerge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1}}}}]\n",
    "a chain of merges, one of them a base": """\
name: first-merge
merge_method: linear
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 0.5
---
name: second-merge
merge_method: slerp
base_model: first-merge  # the one above
models:
  - model: {c}
parameters:
  t: 0.5
---
# the result
merge_method: ties
base_model: {base}
models:
  - model: second-merge
    parameters: {{density: 0.6, weight: 0.5}}
  - model: {a}
    parameters: {{density: 0.8, weight: 0.5}}
""",
    "layers of a merge, with the tokenizer of another": """\
models:
  - model: {a}
merge_method: nearswap
base_model: {base}
parameters:
  t: 0.0008
name: Core
---
merge_method: passthrough
slices:
- sources:  # first
  - model: {c}
    layer_range: [0, 1]

- sources:  # the merge
  - model: Core
    layer_range: [1, 4]
tokenizer:
  source: Core
""",
    "an empty table for the tokenizer, and a chat template by name": """\
models:
  - model: {a}
    parameters: {{weight: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5}}
merge_method: linear
tokenizer: {{}}
chat_template: "chatml"
""",
    "new tokens, and a multiple for the rows": """\
merge_method: linear
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.5}}
  - model: {base}
    parameters: {{weight: 0.5}}
tokenizer:
  source: union
  tokens:
    <|im_end|>:
      source:
        kind: model_token
        model: {a}
        token: "w5"
    <pad>:
      source: {{kind: zero}}
    w7: {{source: {a}, force: true}}
  pad_to_multiple_of: 2
""",
}

REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "a revision beside the model": (
        "merge_method: passthrough\nmodels:\n  - model: {a}\n    revision: main\n",
        (":4: 'revision'", "write `model: PATH@REVISION`"),
    ),
    "parameters beside the model": (
        "merge_method: ties\nbase_model: {base}\nmodels:\n  - model: {a}\n    density: 1.0\n    weight: 0.6\n",
        (":5: 'density'", "write `parameters: {density: ...}`"),
    ),
    "a parameter at the top": (
        "merge_method: sce\nbase_model: {base}\nmodels: [{{model: {a}}}]\nselect_topk: .15\n",
        (":4: 'select_topk'", "write `parameters: {select_topk: ...}`"),
    ),
    "a parameter of another method": (
        "merge_method: model_stock\nbase_model: {base}\nmodels:\n  - model: {a}\n    parameters: {{weight: 1}}\n",
        (":5: 'weight' is a parameter of linear, ", "model_stock takes filter_wise; remove it, since mergekit passes"),
    ),
    "the type among the parameters": (
        "merge_method: linear\nmodels: [{{model: {a}}}]\nparameters:\n  weight: 1\n  dtype: bfloat16\n",
        (":5: 'dtype'", "move it to the top level"),
    ),
    "a method for a slice": (
        "merge_method: linear\nslices:\n  - sources: [{{model: {a}, layer_range: [0, 4]}}]\n    merge_method: slerp\n",
        (":4: 'merge_method'", "move it to the top level"),
    ),
    "padding at the top": (
        "merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1}}}}]\npad_to_multiple_of: 8\n",
        (":3: 'pad_to_multiple_of'", "tokenizer: {source: union, pad_to_multiple_of: ...}"),
    ),
    "a seed": (
        "merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1}}}}]\nrandom_seed: 42\n",
        (":3: 'random_seed'", "--random-seed"),
    ),
    "a mixture of experts": (
        "base_model: {base}\ngate_mode: hidden\nexperts:\n  - source_model: {a}\n    positive_prompts: [math]\n",
        (":2: 'gate_mode'", "built by mergekit-moe"),
    ),
    "the base in another spelling": (
        "merge_method: ties\nbase_model: {base}\nmodels:\n  - model: /{base}\n  - model: {a}\n"
        "    parameters: {{weight: 1}}\n",
        (":4: '/", "is the base model written in another way", "too"),
    ),
    "tabs": (
        "merge_method: linear\nmodels:\n\t- model: {a}\n",
        (":3: is not valid YAML (a tab in column 1); put spaces in its place",),
    ),
}


@pytest.fixture(scope="module")
def models(families: Families) -> dict[str, Path]:
    return _named(families(FamilyKind(BF16, experts=3, layers=LAYERS)))


def _named(made: Family) -> dict[str, Path]:
    return {"base": made.base, **dict(zip("abc", made.experts, strict=True))}


def merge(directory: Path, text: str) -> tuple[Tensors, tuple[str, ...]]:
    """Return the tensors that mergefs makes of a config, and the notes of its plan."""
    recipe = directory / "recipe.yml"
    recipe.write_bytes(text.encode())
    with mergefs.open(recipe) as model:
        return {name: model.get_tensor(name) for name in model.keys()}, model.plan.notes  # noqa: SIM118 (no mapping)


def mergekit(text: str) -> Tensors:
    """Return what mergekit makes of a config, with nothing left to chance."""
    documents = [document for document in yaml.safe_load_all(text) if document]
    with contextlib.ExitStack() as stack:
        for method in {document["merge_method"] for document in documents}:
            stack.enter_context(nothing_left_to_chance(method))
        return mergekit_merge(documents[0]) if len(documents) == 1 else mergekit_multi(documents)


@pytest.mark.parametrize("name", SAME)
def test_a_config_as_people_write_it_gives_what_mergekit_gives(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    text = SAME[name].format(**models)
    assert differing(merge(tmp_path, text)[0], mergekit(text)) == {}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_mergekit_would_misunderstand_is_refused_with_what_to_write(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    text, words = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        merge(tmp_path, text.format(**models))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("filter_", "hint"),
    [("lm_head", "names of tensors are such as model.layers."), ("self_atn", "did you mean 'self_attn'?")],
)
def test_a_filter_that_matches_nothing_is_told(families: Families, tmp_path: Path, filter_: str, hint: str) -> None:
    """Such as the output embedding of a model that ties it: the same recipe is good for its larger sisters."""
    models = _named(families(FamilyKind(BF16, tied=True, experts=3)))
    text = """\
models: [{{model: {a}}}, {{model: {b}}}]
merge_method: slerp
base_model: {a}
parameters:
  t:
    - {{filter: FILTER, value: 0.7}}
    - value: 0.5
""".format(**models).replace("FILTER", filter_)
    tensors, notes = merge(tmp_path, text)
    assert differing(tensors, mergekit(text)) == {}
    assert [hint in note for note in notes if f"the filter '{filter_}' matches no tensor" in note] == [True]


@pytest.mark.parametrize(("options", "told"), [([], True), (["--quiet"], False)])
def test_who_mounts_is_told_too(families: Families, directory: Path, options: list[str], told: bool) -> None:
    models = _named(families(FamilyKind(BF16, experts=3)))
    recipe = directory / "recipe.yml"
    recipe.write_text(
        "merge_method: linear\nparameters: {{weight: [{{filter: self_atn, value: 2}}, {{value: 1}}]}}\n"
        "models: [{{model: {a}}}]\n".format(**models)
    )
    (directory / "mnt").mkdir()
    state = directory / "state"
    done = run_mergefs("mount", *options, recipe, directory / "mnt", state=state)
    assert (done.returncode, done.stdout) == (0, "")
    note = f"{recipe}: the filter 'self_atn' matches no tensor, so its value is not used; did you mean 'self_attn'?"
    assert done.stderr == (f"note: {note}\n" if told else "")
    assert run_mergefs("umount", directory / "mnt", state=state).returncode == 0


@pytest.mark.parametrize(("base", "told"), [("base_model: {base}\n", True), ("", False)])
def test_a_base_on_the_command_line_beside_that_of_the_recipe_is_told(
    families: Families, tmp_path: Path, base: str, told: bool
) -> None:
    models = _named(families(FamilyKind(BF16, experts=3)))
    recipe = tmp_path / "recipe.yml"
    text = base + "merge_method: linear\nmodels: [{{model: {a}}}]\nparameters: {{weight: 1}}\n"
    recipe.write_text(text.format(**models))
    with mergefs.open(recipe, base=str(models["b"])) as model:
        assert [f"{recipe} names its own base, so --base is not used for it" in model.plan.notes] == [told]
