"""Nothing of the inputs is lost: every tensor is in the merged model, whatever its name and its shape."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama_config, llama_tensors, write_model
from recipes import write_document
from tensors import Tensors, merge_by_mergefs

import mergefs
from mergefs.errors import PlanError

F32 = torch.float32
LAYERS = 2


def strange_tensors(seed: int) -> Tensors:
    """Return tensors of a model of no known architecture: towers, fused experts, convolutions, buffers, scalars."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = llama_tensors(seed, F32, layers=LAYERS)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.bias"] = draw(16)
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = draw(4, 8, 6)
    for layer in range(5):
        tensors[f"vision_tower.encoder.layers.{layer}.attn.weight"] = draw(6, 6)
    tensors["vision_tower.patch_embed.proj.weight"] = draw(6, 3, 2, 2)
    tensors["vision_tower.patch_embed.proj3d.weight"] = draw(4, 3, 2, 2, 2)
    tensors["multi_modal_projector.linear.weight"] = draw(8, 6)
    tensors["logit_scale"] = draw()
    tensors["nothing"] = draw(0, 4)
    return tensors


def unmergeable_tensors() -> Tensors:
    return {
        "model.position_ids": torch.arange(7),
        "model.mask": torch.tensor([True, False, True]),
        "router.counts": torch.tensor([[3, 1], [4, 1]], dtype=torch.int32),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("every")
    config = llama_config(F32, layers=LAYERS) | {"architectures": ["NobodyKnowsItForCausalLM"]}
    return {
        name: write_model(directory / name, strange_tensors(seed) | unmergeable_tensors(), config)
        for seed, name in enumerate(("base", "first", "second"))
    }


def recipe(models: dict[str, Path], method: str = "task_arithmetic", **parameters: Any) -> dict[str, Any]:
    entries = [
        {"model": str(models[name]), "parameters": {"weight": weight}}
        for name, weight in (("first", 0.25), ("second", 0.5))
    ]
    return {
        "merge_method": method,
        "base_model": str(models["base"]),
        "models": entries,
        "parameters": parameters,
    }


def test_every_tensor_is_merged_or_copied(models: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_by_mergefs(tmp_path, recipe(models))
    base, first, second = (strange_tensors(seed) for seed in range(3))
    assert merged.keys() == base.keys() | unmergeable_tensors().keys()
    for name, tensor in base.items():
        total = (first[name] - tensor) * 0.25 + (second[name] - tensor) * 0.5
        assert torch.equal(merged[name], tensor + total), name
    for name, tensor in unmergeable_tensors().items():
        assert torch.equal(merged[name], tensor), name
        assert merged[name].dtype == tensor.dtype


def test_a_gradient_runs_over_the_layers_of_each_tower(models: dict[str, Path], tmp_path: Path) -> None:
    document = recipe(models)
    for entry in document["models"]:
        entry["parameters"] = {"weight": [0.0, 1.0] if entry is document["models"][0] else 0.0}
    merged = merge_by_mergefs(tmp_path, document)
    base, first = strange_tensors(0), strange_tensors(1)
    for layer in range(5):
        name = f"vision_tower.encoder.layers.{layer}.attn.weight"
        assert torch.allclose(merged[name], base[name] + (first[name] - base[name]) * layer / 4, atol=1e-6)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        assert torch.equal(merged[name], base[name] if layer == 0 else base[name] + (first[name] - base[name]))


def altered(models: dict[str, Path], tmp_path: Path, drop: str = "", **new: torch.Tensor) -> dict[str, Path]:
    """Return the models with the second expert lacking the tensors called ``drop``, or having ``new`` ones."""
    tensors = {name: tensor for name, tensor in strange_tensors(2).items() if not drop or not name.endswith(drop)}
    config = json.loads((models["second"] / "config.json").read_text())
    return models | {"second": write_model(tmp_path / "altered", tensors | unmergeable_tensors() | new, config)}


def test_biases_that_one_expert_lacks_are_merged_from_the_others_and_told(
    models: dict[str, Path], tmp_path: Path
) -> None:
    document = recipe(altered(models, tmp_path, drop="q_proj.bias"))
    merged = merge_by_mergefs(tmp_path, document)
    base, first = strange_tensors(0), strange_tensors(1)
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(merged[name], base[name] + (first[name] - base[name]) * 0.25)
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        assert any(note.startswith(f"{name}: merged without") for note in model.plan.notes)


@pytest.mark.parametrize(
    ("method", "lacking", "taken"),
    [("slerp", "base", "first"), ("slerp", "first", "base"), ("nearswap", "first", "base")],
)
def test_a_bias_of_one_model_alone_is_taken_as_the_method_says(
    models: dict[str, Path], tmp_path: Path, method: str, lacking: str, taken: str
) -> None:
    seed = ("base", "first").index(lacking)
    tensors = {name: tensor for name, tensor in strange_tensors(seed).items() if not name.endswith(".bias")}
    config = json.loads((models[lacking] / "config.json").read_text())
    pair = models | {lacking: write_model(tmp_path / "lacking", tensors | unmergeable_tensors(), config)}
    document = {
        "merge_method": method,
        "base_model": str(pair["base"]),
        "models": [{"model": str(pair["first"])}],
        "parameters": {"t": 0.5},
    }
    name = "model.layers.0.self_attn.q_proj.bias"
    expected = strange_tensors(("base", "first").index(taken))[name]
    assert torch.equal(merge_by_mergefs(tmp_path, document)[name], expected)


@pytest.mark.parametrize(
    ("method", "with_base", "lacking", "words"),
    [
        ("nuslerp", True, "second", "may be missing, as far as the method can do without"),
        ("arcee_fusion", True, "first", None),
        ("nuslerp", False, "second", None),
    ],
)
def test_a_bias_that_leaves_too_few_experts_is_refused_or_taken_from_the_only_one(
    models: dict[str, Path], tmp_path: Path, method: str, with_base: bool, lacking: str, words: str | None
) -> None:
    seed = ("base", "first", "second").index(lacking)
    tensors = {name: tensor for name, tensor in strange_tensors(seed).items() if not name.endswith(".bias")}
    config = json.loads((models[lacking] / "config.json").read_text())
    three = models | {lacking: write_model(tmp_path / "lacking", tensors | unmergeable_tensors(), config)}
    listed = ("first",) if method == "arcee_fusion" else ("first", "second")
    document: dict[str, Any] = {"merge_method": method, "models": [{"model": str(three[name])} for name in listed]}
    if method == "nuslerp":
        document["parameters"] = {"weight": 1}
    if with_base:
        document["base_model"] = str(three["base"])
    if words is not None:
        with pytest.raises(PlanError, match=words):
            merge_by_mergefs(tmp_path, document)
        return
    name = "model.layers.0.self_attn.q_proj.bias"
    expected = strange_tensors(0 if method == "arcee_fusion" else 1)[name]
    assert torch.equal(merge_by_mergefs(tmp_path, document)[name], expected)


@pytest.mark.parametrize(("drop", "words"), [("up_proj.weight", "lacks tensor"), ("gate_up_proj", "only biases")])
def test_a_weight_that_one_expert_lacks_is_refused(
    models: dict[str, Path], tmp_path: Path, drop: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        merge_by_mergefs(tmp_path, recipe(altered(models, tmp_path, drop=drop)))


def test_a_bias_that_the_base_lacks_is_refused_where_the_method_needs_the_base(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in strange_tensors(0).items() if not name.endswith(".bias")}
    config = json.loads((models["base"] / "config.json").read_text())
    bare = models | {"base": write_model(tmp_path / "bare", tensors | unmergeable_tensors(), config)}
    with pytest.raises(PlanError, match="nothing to merge it with"):
        merge_by_mergefs(tmp_path, recipe(bare))


def test_biases_of_some_models_are_averaged_without_a_base(models: dict[str, Path], tmp_path: Path) -> None:
    changed = altered(models, tmp_path, drop="q_proj.bias")
    entries = [{"model": str(changed[name]), "parameters": {"weight": 0.5}} for name in ("second", "base", "first")]
    merged = merge_by_mergefs(tmp_path, {"merge_method": "linear", "models": entries})
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.allclose(merged[name], (strange_tensors(0)[name] + strange_tensors(1)[name]) / 2)


def test_a_tensor_that_only_an_expert_has_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"has tensor 'extra\.weight', which .* lacks"):
        merge_by_mergefs(tmp_path, recipe(altered(models, tmp_path, **{"extra.weight": torch.ones(2, 2)})))


# What is worth telling


def notes(models: dict[str, Path], tmp_path: Path, document: dict[str, Any]) -> tuple[str, ...]:
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        return model.plan.notes


def test_weights_that_sum_to_zero_are_told_once(models: dict[str, Path], tmp_path: Path) -> None:
    document = recipe(models, normalize=True)
    document["models"][0]["parameters"]["weight"] = -0.5
    (told,) = notes(models, tmp_path, document)
    assert "more): the weights sum to 0, so `normalize` divides by nothing" in told
    assert notes(models, tmp_path, recipe(models, normalize=True)) == ()


def test_a_gradient_that_is_longer_than_the_layers_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    document = recipe(models)
    document["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 1}]
    (told,) = notes(models, tmp_path, document)
    assert "a gradient of 'weight' has 3 values for 2 layers" in told
