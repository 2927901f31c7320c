"""Variants of a recipe: what KEY=VALUE changes, where, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import family
from hypothesis import given
from hypothesis import strategies as st
from recipes import MERGES, write_document, write_recipe

import mergefs
from mergefs.checkpoint.dtypes import BF16
from mergefs.errors import RecipeError
from mergefs.methods.registry import specification
from mergefs.recipe.model import Recipe, parse_recipe
from mergefs.recipe.parameters import resolve_parameters
from mergefs.recipe.settings import Gradient
from mergefs.recipe.variants import parse_variant, vary

TIES = """
# what the team runs
merge_method: ties
base_model: /models/base
models:
  - model: /models/expert-code
    parameters: {weight: 0.5, density: 0.4}
  - model: /models/expert-math
    parameters:
      weight: 0.7
parameters:
  density: 0.6
dtype: float32
"""

SLICES = """
merge_method: linear
slices:
  - sources:
      - {model: /a, layer_range: [0, 2], parameters: {weight: 1.0}}
      - {model: {model: {path: /b}}, layer_range: [0, 2], parameters: {weight: 2.0}}
    parameters: {normalize: false}
  - sources:
      - {model: /a, layer_range: [2, 4]}
      - {model: /b, layer_range: [2, 4]}
    parameters: {weight: 3.0}
"""


def varied(text: str, variant: str) -> Recipe:
    return vary(parse_recipe(text, "merge.yml", Path("/recipes")), parse_variant(variant))


def values(recipe: Recipe, name: str, part: int = 0) -> list[object]:
    method = specification(recipe.method)
    assert method is not None
    resolved = resolve_parameters(recipe, method, "t", 0.0, recipe.modules[0], recipe.slices[part])
    return [model.get(name) for model in resolved.per_model]


def test_a_parameter_is_changed_for_all_models_whatever_each_had() -> None:
    assert values(varied(TIES, "density=0.3"), "density")[:2] == [0.3, 0.3]
    assert values(parse_recipe(TIES, "merge.yml"), "density")[:2] == [0.4, 0.6]


@pytest.mark.parametrize("name", ["2", "expert-math"])
def test_a_parameter_is_changed_for_one_model_by_its_number_or_name(name: str) -> None:
    recipe = varied(TIES, f"density.{name}=0.1,weight.1=2")
    assert values(recipe, "density")[:2] == [0.4, 0.1]
    assert values(recipe, "weight")[:2] == [2.0, 0.7]


def test_all_models_first_and_then_one_of_them() -> None:
    assert values(varied(TIES, "weight=1,weight.2=0.25"), "weight")[:2] == [1.0, 0.25]


def test_slices_change_wherever_a_model_is_listed() -> None:
    recipe = varied(SLICES, "weight.b=7,normalize=true")
    assert [values(recipe, "weight", part) for part in range(2)] == [[1.0, 7.0], [3.0, 7.0]]
    method = specification("linear")
    assert method is not None
    shared = [resolve_parameters(recipe, method, "t", 0, part=part).shared["normalize"] for part in recipe.slices]
    assert shared == [True, True]


def test_the_method_and_dtypes_of_the_whole_recipe_can_be_changed() -> None:
    recipe = varied(TIES, "method=dare_ties,dtype=bfloat16,out_dtype=float16")
    assert recipe.method == "dare_ties"
    assert recipe.dtype == BF16
    assert recipe.out_dtype is not None
    assert recipe.out_dtype.name == "F16"


def test_a_budget_is_no_part_of_the_recipe() -> None:
    variant = parse_variant("budget=25%,density=0.5")
    assert variant.budget == "25%"
    assert "budget" not in vary(parse_recipe(TIES, "merge.yml"), variant).text.partition("\n")[2]


def test_a_gradient_has_colons_between_its_values() -> None:
    assert varied(TIES, "weight=0:0.5:1").parameters["weight"] == Gradient((0, 0.5, 1))


def test_the_text_of_a_variant_is_a_recipe_that_says_what_it_is() -> None:
    recipe = varied(TIES, "density=0.3")
    assert recipe.text.startswith("# merge.yml with density=0.3\n")
    again = parse_recipe(recipe.text, "again.yml", *recipe.directories)
    assert (again.modules, again.parameters, again.base) == (recipe.modules, recipe.parameters, recipe.base)
    assert recipe.origin == "merge.yml@density=0.3"
    assert recipe.directories == (Path("/recipes"),)


def test_the_final_merge_of_several_is_changed() -> None:
    inner = "name: first\nmerge_method: linear\nmodels: [{model: /a, parameters: {weight: 1}}]\n"
    outer = "merge_method: linear\nmodels: [{model: first, parameters: {weight: 1}}]\n"
    recipe = varied(f"{inner}---\n{outer}", "weight=5")
    assert values(recipe, "weight") == [5.0]
    assert values(recipe.inner["first"], "weight") == [1.0]


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("", "KEY=VALUE"),
        ("density", "KEY=VALUE"),
        ("density=", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("density=0.3,,weight=1", "KEY=VALUE"),
        ("density=0.3,density=0.4", "twice"),
        ("density=../x", "no value"),
        ("density=1e999", "too large"),
        ("weight.=1", "names no model"),
        ("dtype.1=float16", "whole recipe"),
        ("colour=red", "can not be changed"),
        ("weight.3x=1", "no model of the recipe"),
        ("weight.9=1", "no model of the recipe"),
        ("density.base=0.5", "has no entry"),
        ("density=7", "density"),
        ("method=tise", "tise"),
        ("dtype=int8", "int8"),
    ],
)
def test_what_is_no_variant_is_refused_with_its_reason(variant: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        varied(TIES, variant)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_variant_or_is_refused(text: str) -> None:
    try:
        recipe = varied(TIES, text)
    except RecipeError:
        return
    assert yaml.safe_load(recipe.text)


# On the command line --------------------------------------------------------------------------------------------------


def test_commands_take_a_variant_in_the_place_of_a_recipe(tmp_path: Path) -> None:
    models = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = write_recipe(tmp_path / "merge.yml", MERGES["task_arithmetic"], models)
    with mergefs.open(f"{recipe}@lambda=0.25,budget=30%", catalog=tmp_path / "catalog") as model:
        told = model.plan
    assert told.outcome.budget_bytes == int(0.3 * told.outcome.expert_bytes_total)
    changed = yaml.safe_load(recipe.read_text()) | {"parameters": {"lambda": 0.25}}
    by_hand = write_document(tmp_path / "by-hand.yml", changed)
    with mergefs.open(by_hand, budget="30%", catalog=tmp_path / "catalog") as model:
        assert model.plan.plan_id == told.plan_id


def test_a_file_whose_name_has_an_at_sign_is_that_file(tmp_path: Path) -> None:
    models = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = write_recipe(tmp_path / "merge.yml", MERGES["task_arithmetic"], models)
    named = recipe.rename(tmp_path / "merge.yml@lambda=2")
    recipe.write_text("nonsense")
    with mergefs.open(named, catalog=tmp_path / "catalog") as model:
        assert model.plan.recipe.origin == str(named)
