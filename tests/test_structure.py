"""Slices, modules and recipes of several documents: tensors as mergekit's, and a config.json that fits them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from oracle import mergekit_merge, mergekit_multi, nothing_left_to_chance
from recipes import write_document
from tensors import Tensors, differing, merge_by_mergefs

import mergefs
from mergefs.errors import RecipeError

BF16 = torch.bfloat16
LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("structure")
    return family(directory, experts=2, dtype=BF16, tied=False, shards=1, layers=LAYERS)


def source(model: Path, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "layer_range": [first, stop], "parameters": parameters}


def sliced(*slices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {"slices": [{"sources": sources} for sources in slices]} | others


def config_of(directory: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    with mergefs.open(write_document(directory / "config-recipe.yml", document)) as model:
        config: dict[str, Any] = json.loads(model.read_file("config.json"))
        return config


def assert_equal(directory: Path, document: Mapping[str, Any]) -> Tensors:
    with nothing_left_to_chance(document["merge_method"]):
        theirs = mergekit_merge(document)
    ours = merge_by_mergefs(directory, document)
    assert differing(ours, theirs) == {}
    return ours


# Slices


def test_layers_are_stacked_overlapping_and_repeated_and_numbered_anew(models: Family, tmp_path: Path) -> None:
    first, second = models.experts
    document = sliced(
        [source(first, 0, 3)],
        [source(second, 1, 4)],
        [source(first, 2, 3)],
        [source(first, 2, 3)],
        merge_method="passthrough",
    )
    ours = assert_equal(tmp_path, document)
    assert {name.split(".")[2] for name in ours if ".layers." in name} == {str(number) for number in range(8)}
    assert torch.equal(ours["model.layers.6.mlp.up_proj.weight"], ours["model.layers.7.mlp.up_proj.weight"])
    assert config_of(tmp_path, document)["num_hidden_layers"] == 8


def test_a_scale_by_filter_and_slice_is_applied_to_repeated_layers(models: Family, tmp_path: Path) -> None:
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    document = sliced(
        [source(models.base, 0, 2)],
        [source(models.base, 1, 3, scale=scale)],
        [source(models.base, 3, 4)],
        merge_method="passthrough",
    )
    assert_equal(tmp_path, document)


@pytest.mark.parametrize("method", ["slerp", "ties", "linear"])
def test_slices_are_merged_with_parameters_of_every_level(models: Family, tmp_path: Path, method: str) -> None:
    first, second = models.experts
    document: dict[str, Any] = {
        "slerp": sliced(
            [source(models.base, 0, 2), source(first, 0, 2)],
            [source(models.base, 1, 4), source(first, 1, 4)],
            merge_method="slerp",
            base_model=str(models.base),
            parameters={"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.4}]},
        ),
        "ties": sliced(
            [source(models.base, 0, 2), source(first, 0, 2, weight=0.5, density=0.5), source(second, 1, 3, weight=0.7)],
            [source(first, 0, 4, weight=[0.1, 0.9], density=0.3), source(models.base, 0, 4)],
            merge_method="ties",
            base_model=str(models.base),
            parameters={"density": 0.4, "normalize": True},
        ),
        "linear": sliced(
            [source(first, 0, 1, weight=0.3), source(second, 3, 4, weight=0.5)],
            [source(first, 1, 4, weight=[0.3, 1.0]), source(second, 1, 4)],
            merge_method="linear",
            parameters={"weight": 0.7, "normalize": False},
        ),
    }[method]
    document["slices"][1]["parameters"] = {"t": 0.25} if method == "slerp" else {"normalize": False}
    assert_equal(tmp_path, document)


def test_a_slice_may_have_a_base_of_its_own(models: Family, tmp_path: Path) -> None:
    first, second = models.experts
    document = sliced(
        [source(models.base, 0, 2), source(first, 0, 2)],
        [source(second, 2, 4), source(first, 2, 4)],
        merge_method="slerp",
        base_model=str(models.base),
        parameters={"t": 0.3},
    )
    document["slices"][1]["base_model"] = str(second)
    assert_equal(tmp_path, document)


def test_the_base_of_a_stack_gives_the_configuration(models: Family, tmp_path: Path) -> None:
    document = sliced([source(models.experts[0], 0, 2)], merge_method="passthrough", base_model=str(models.base))
    assert_equal(tmp_path, document)
    assert config_of(tmp_path, document)["num_hidden_layers"] == 2


def test_an_architecture_may_be_overridden(models: Family, tmp_path: Path) -> None:
    base = {"model": {"path": str(models.base)}, "override_architecture": "MistralForCausalLM"}
    document = {"merge_method": "passthrough", "models": [{"model": base}]}
    plain = {"merge_method": "passthrough", "models": [{"model": str(models.base)}]}
    config = config_of(tmp_path, document)
    assert config.pop("architectures") == ["MistralForCausalLM"]
    assert config == {key: value for key, value in config_of(tmp_path, plain).items() if key != "architectures"}
    assert_equal(tmp_path, document)


PER_LAYER = {
    "layer_types": ["full", "sliding", "full", "linear"],
    "no_rope_layers": [1, 1, 0, 1],
    "mlp_only_layers": [1, 3],
    "max_window_layers": 4,
    "eos_token_id": [1, 2, 3, 4],
}


def test_lists_with_an_entry_for_each_layer_follow(models: Family, tmp_path: Path) -> None:
    path = models.experts[0] / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | PER_LAYER))
    try:
        first = models.experts[0]
        config = config_of(
            tmp_path,
            sliced([source(first, 0, 2)], [source(first, 1, 4)], [source(first, 3, 4)], merge_method="passthrough"),
        )
    finally:
        path.write_text(before)
    assert {key: config[key] for key in PER_LAYER} == {
        "layer_types": ["full", "sliding", "sliding", "full", "linear", "linear"],
        "no_rope_layers": [1, 1, 1, 0, 1, 1],
        "mlp_only_layers": [1, 2, 4, 5],
        "max_window_layers": 6,
        "eos_token_id": [1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_range": [0, 9]}, ("[0, 9]", "beyond its 4 layers", "end it at 4")),
        ({"layer_range": [3, 1]}, ("[3, 1] holds no layers", ":")),
        ({"layer_range": [0, 1.5]}, ("two whole numbers",)),
        ({"layer_range": [1]}, ("two whole numbers",)),
        ({"layer_range": "all"}, ("two whole numbers",)),
        ({"layer_range": None}, ("no layer_range", "[0, 8]")),
        ({"layers": [0, 2]}, ("'layers' is not a key of a source", "layer_range")),
        ({"model": None}, ("names no model",)),
    ],
)
def test_a_wrong_source_is_named(
    models: Family, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    document = sliced([source(models.base, 0, 2) | change], merge_method="passthrough")
    with pytest.raises(RecipeError) as caught:
        merge_by_mergefs(tmp_path, document)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sources_of_different_lengths_are_refused(models: Family, tmp_path: Path) -> None:
    document = sliced(
        [source(models.base, 0, 2, weight=1), source(models.experts[0], 0, 3, weight=1)], merge_method="linear"
    )
    with pytest.raises(RecipeError, match=r"has 3 layers and the first source of this slice has 2; give all"):
        merge_by_mergefs(tmp_path, document)


def test_a_slice_without_its_base_is_refused(models: Family, tmp_path: Path) -> None:
    document = sliced(
        [source(models.experts[0], 0, 2), source(models.experts[1], 0, 2)],
        merge_method="slerp",
        base_model=str(models.base),
        parameters={"t": 0.5},
    )
    with pytest.raises(RecipeError, match="is not among the sources of this slice"):
        merge_by_mergefs(tmp_path, document)


# Modules


def test_the_only_module_of_a_model_may_be_named(models: Family, tmp_path: Path) -> None:
    entries = [{"model": str(expert), "parameters": {"weight": 0.4}} for expert in models.experts]
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(models.base),
        "modules": {"default": {"models": entries, "parameters": {"lambda": 0.5}}},
    }
    assert_equal(tmp_path, document)


def test_what_is_in_no_module_of_the_recipe_is_copied_and_told(models: Family, tmp_path: Path) -> None:
    entries = [{"model": str(expert), "parameters": {"weight": 0.4}} for expert in models.experts]
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(models.base),
        "modules": {"model.layers": {"models": entries}},
    }
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        assert sorted(note.split(":")[0] for note in model.plan.notes) == [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.norm.weight",
        ]
        assert all("no module of the recipe" in note for note in model.plan.notes)


def test_an_unknown_module_is_refused_with_those_that_there_are(models: Family, tmp_path: Path) -> None:
    document = {
        "merge_method": "passthrough",
        "modules": {"vision_tower": {"models": [{"model": str(models.base)}]}},
    }
    with pytest.raises(
        RecipeError, match=r"no module 'vision_tower'; its modules are text_decoder, model\.layers, default"
    ):
        merge_by_mergefs(tmp_path, document)


# Several documents


def chained(models: Family, *names: str) -> list[dict[str, Any]]:
    first, second = (str(expert) for expert in models.experts)
    inner = {
        "name": names[0],
        "merge_method": "task_arithmetic",
        "base_model": str(models.base),
        "models": [{"model": first, "parameters": {"weight": 0.6}}, {"model": second, "parameters": {"weight": 0.3}}],
    }
    outer = {
        "merge_method": "ties",
        "base_model": str(models.base),
        "models": [
            {"model": names[0], "parameters": {"weight": 0.5, "density": 0.4}},
            {"model": second, "parameters": {"weight": 0.7, "density": 0.6}},
        ],
    }
    return [inner, outer]


def test_a_merge_is_the_input_of_the_next_one(models: Family, tmp_path: Path) -> None:
    documents = chained(models, "inner")
    with nothing_left_to_chance("ties"):
        theirs = mergekit_multi(documents)
    assert differing(merge_by_mergefs(tmp_path, documents), theirs) == {}


def test_an_intermediate_merge_is_rounded_to_its_own_dtype(models: Family, tmp_path: Path) -> None:
    inner, outer = chained(models, "inner")
    documents = [inner | {"dtype": "float32", "out_dtype": "float16"}, outer | {"dtype": "float32"}]
    with nothing_left_to_chance("ties"):
        theirs = mergekit_multi(documents)
    assert differing(merge_by_mergefs(tmp_path, documents), theirs) == {}


def test_a_merge_of_a_stack_of_a_merge(models: Family, tmp_path: Path) -> None:
    inner, _ = chained(models, "inner")
    middle = sliced(
        [{"model": "inner", "layer_range": [0, 3]}],
        [{"model": str(models.base), "layer_range": [2, 4]}],
        merge_method="passthrough",
        name="middle",
    )
    other = sliced(
        [source(models.base, 0, 3)], [source(models.experts[1], 2, 4)], merge_method="passthrough", name="other"
    )
    outer = {"merge_method": "slerp", "base_model": "middle", "models": [{"model": "other"}], "parameters": {"t": 0.4}}
    documents = [outer, other, middle, inner]
    with nothing_left_to_chance("slerp"):
        theirs = mergekit_multi(documents)
    assert differing(merge_by_mergefs(tmp_path, documents), theirs) == {}
    with mergefs.open(write_document(tmp_path / "chain.yml", documents)) as model:
        assert json.loads(model.read_file("config.json"))["num_hidden_layers"] == 5


def test_of_documents_with_names_the_one_that_no_other_merges_is_the_result(models: Family, tmp_path: Path) -> None:
    inner, outer = chained(models, "inner")
    unnamed = merge_by_mergefs(tmp_path, [inner, outer])
    assert differing(merge_by_mergefs(tmp_path, [outer | {"name": "outer"}, inner]), unnamed) == {}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((None, None), "without a name starts here"),
        (("inner", "inner"), "is taken by another document"),
        (("other", "third"), "no other merges 'other', 'third'"),
    ],
)
def test_documents_that_do_not_fit_together_are_refused(
    models: Family, tmp_path: Path, names: tuple[str | None, str | None], words: str
) -> None:
    inner, outer = chained(models, "unused")
    outer["models"] = inner["models"]
    documents = [document | {"name": name} for document, name in zip((inner, outer), names, strict=True)]
    with pytest.raises(RecipeError, match=words):
        merge_by_mergefs(tmp_path, documents)


def test_a_circle_of_documents_is_refused(models: Family, tmp_path: Path) -> None:
    inner, outer = chained(models, "inner")
    inner["base_model"] = "outer"
    with pytest.raises(RecipeError, match=r"in a circle \(outer -> inner -> outer\)|all are merged"):
        merge_by_mergefs(tmp_path, [inner, outer | {"name": "outer"}])
