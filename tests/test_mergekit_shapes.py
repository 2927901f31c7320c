"""Tensors of any shape, and data of any kind, merged by mergekit's own functions and through ``mergefs.open``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama_config, write_model
from examples import METHODS
from mergekit.merge_methods import get
from mergekit.merge_methods.base import TensorGroup
from oracle import nothing_left_to_chance
from recipes import Merge, write_document
from tensors import Tensors, differing

import mergefs
from mergefs.errors import RecipeError
from mergefs.methods.contract import Scope
from mergefs.methods.registry import METHODS as METHODS_BY_NAME
from mergefs.sources import blocks

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WORK_DTYPES = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
SHAPES = ((1,), (7,), (33,), (5, 3), (1, 9), (9, 1), (24, 40), (3, 4, 5), (4, 1, 6), (2, 3, 4, 5))


def random_models(count: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensors]:
    """Return models, all near to the first, with a tensor of each shape."""
    generator = torch.Generator().manual_seed(11)
    base = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    return [
        {
            f"t{number}.weight": (tensor + 0.05 * model * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for number, tensor in enumerate(base)
        }
        for model in range(count)
    ]


def document_of(directory: Path, merge: Merge, models: list[Tensors]) -> dict[str, Any]:
    """Write the models, the base first where the merge has one, and return the recipe."""
    dtype = next(iter(models[0].values())).dtype
    paths = [write_model(directory / f"model-{i}", tensors, llama_config(dtype)) for i, tensors in enumerate(models)]
    entries = zip(paths[merge.with_base :], merge.per_expert, strict=True)
    document: dict[str, Any] = {
        "merge_method": merge.method,
        "models": [{"model": str(path), "parameters": dict(parameters)} for path, parameters in entries],
        "parameters": dict(merge.parameters),
    }
    return document | ({"base_model": str(paths[0])} if merge.with_base else {})


def merged_by_us(directory: Path, merge: Merge, models: list[Tensors]) -> Tensors:
    recipe = write_document(directory / "recipe.yml", document_of(directory, merge, models))
    with mergefs.open(recipe) as model:
        return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)


def merged_by_mergekit(merge: Merge, models: list[Tensors]) -> Tensors:
    """Return what mergekit's method makes of each tensor; models are in the order that our recipe's inputs have."""
    ordered = [*models[1:], models[0]] if merge.with_base else models
    base_index = len(models) - 1 if merge.with_base else None
    names = {name for parameters in merge.per_expert for name in parameters}
    # A method that knows no base takes a value for each input, and the others one for each expert.
    lists = {name: [parameters[name] for parameters in merge.per_expert] for name in names}
    merged: Tensors = {}
    for name, first in models[0].items():
        group = TensorGroup.from_tensors([model[name] for model in ordered], base_index=base_index, name=name)
        (result,) = get(merge.method)([group], parameters={**merge.parameters, **lists})
        merged[name] = result.to(first.dtype)
    return merged


def assert_equal_to_mergekit(directory: Path, merge: Merge, models: list[Tensors]) -> None:
    with nothing_left_to_chance(merge.method):
        theirs = merged_by_mergekit(merge, models)
    assert differing(merged_by_us(directory, merge, models), theirs) == {}


def complete(merge: Merge) -> Merge:
    """Return the merge with every parameter of an expert given, defaults too, as mergekit's functions take them."""
    defaults = {
        parameter.name: parameter.default
        for parameter in METHODS_BY_NAME[merge.method].specification.parameters
        if parameter.scope is not Scope.GLOBAL and parameter.default is not None
    }
    return replace(merge, per_expert=tuple({**defaults, **parameters} for parameters in merge.per_expert))


PARTS: Mapping[str, Merge] = {
    f"nuslerp by {part}{' of deltas' * based}": Merge(
        "nuslerp",
        ({"weight": 0.6}, {"weight": 0.3}),
        {"nuslerp_flatten": False, "nuslerp_row_wise": part == "columns"},
        based,
    )
    for part in ("rows", "columns")
    for based in (True, False)
} | {"model_stock by rows": Merge("model_stock", ({}, {}), {"filter_wise": True})}


@pytest.mark.parametrize("merge", [*map(complete, METHODS.values()), *PARTS.values()], ids=[*METHODS, *PARTS])
@WORK_DTYPES
def test_tensors_of_every_shape_are_merged_as_by_mergekit(tmp_path: Path, merge: Merge, dtype: torch.dtype) -> None:
    """Vectors, matrices, fused experts (three dimensions) and convolutions (four).

    della ranks magnitudes within rows; mergekit ranks along the second dimension, which is not the row where there are
    more than two, and divides by zero in rows of one element.
    """
    ranked = merge.method.startswith("della")
    shapes = tuple(shape for shape in SHAPES if not ranked or (len(shape) <= 2 and shape[-1] > 1))
    models = random_models(len(merge.per_expert) + merge.with_base, dtype, shapes)
    assert_equal_to_mergekit(tmp_path, merge, models)


@pytest.mark.parametrize("elements", [7, 4096])
def test_columns_that_lie_far_apart_are_merged_as_by_mergekit_however_blocks_cut_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    models = random_models(3, F32, ((40, 3), (6, 5, 4), (3, 2, 2, 7)))
    assert_equal_to_mergekit(tmp_path, PARTS["nuslerp by columns of deltas"], models)


# Data that leaves nothing to interpolate


def equal_models(count: int, dtype: torch.dtype) -> list[Tensors]:
    (model,) = random_models(1, dtype)
    return [model] * count


def opposite_models(dtype: torch.dtype) -> list[Tensors]:
    """Return three models of which any two point in opposite directions, or all cancel."""
    (model,) = random_models(1, dtype)
    return [
        model,
        {name: -tensor for name, tensor in model.items()},
        {n: torch.zeros_like(t) for n, t in model.items()},
    ]


EXTREMES = {
    "nuslerp": Merge("nuslerp", ({"weight": 0.6}, {"weight": 0.3}), with_base=False),
    "nuslerp by rows": Merge(
        "nuslerp", ({"weight": 0.6}, {"weight": 0.3}), {"nuslerp_flatten": False}, with_base=False
    ),
    "multislerp": Merge("multislerp", ({"weight": 0.5}, {"weight": 0.5}), with_base=False),
    "karcher": Merge("karcher", ({}, {}), with_base=False),
}


@pytest.mark.parametrize("name", EXTREMES)
@WORK_DTYPES
def test_equal_and_opposite_models_are_merged_as_by_mergekit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert_equal_to_mergekit(tmp_path / "equal", EXTREMES[name], equal_models(2, dtype))
    assert_equal_to_mergekit(tmp_path / "opposite", EXTREMES[name], opposite_models(dtype)[:2])


def test_karcher_of_models_without_a_direction_is_zero_as_in_mergekit(tmp_path: Path) -> None:
    zero = {name: torch.zeros_like(tensor) for name, tensor in random_models(1, F32)[0].items()}
    assert_equal_to_mergekit(tmp_path, EXTREMES["karcher"], [zero, zero])


def test_multislerp_is_the_weighted_sum_where_more_than_two_directions_cancel_and_mergekit_fails(
    tmp_path: Path,
) -> None:
    merge = Merge("multislerp", ({"weight": 0.25}, {"weight": 0.25}, {"weight": 0.5}), with_base=False)
    models = opposite_models(F32)
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        merged_by_mergekit(merge, models)
    merged = merged_by_us(tmp_path, merge, models)
    assert all(bool((tensor == 0).all()) for tensor in merged.values())


def test_multislerp_of_frozen_experts_in_float16_is_the_base_where_mergekit_divides_by_zero(tmp_path: Path) -> None:
    """1e-8 is zero in float16, so nothing keeps mergekit from it."""
    merge = Merge("multislerp", ({"weight": 0.4}, {"weight": 0.6}))
    models = equal_models(3, F16)
    assert all(bool(tensor.isnan().all()) for tensor in merged_by_mergekit(merge, models).values())
    assert differing(merged_by_us(tmp_path, merge, models), models[0]) == {}


def test_karcher_without_a_tolerance_ends_at_the_centre_where_mergekit_divides_by_zero(tmp_path: Path) -> None:
    merge = Merge("karcher", ({}, {}), {"tol": 0}, with_base=False)
    models = [{"t.weight": torch.tensor([1.0, 0.0])}] * 2
    assert bool(merged_by_mergekit(merge, models)["t.weight"].isnan().all())
    assert differing(merged_by_us(tmp_path, merge, models), models[0]) == {}


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "arcee_fusion"])
@WORK_DTYPES
def test_a_nan_in_the_data_is_served_and_does_not_fail_a_read(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    merge = complete(METHODS[name])
    models = random_models(len(merge.per_expert) + merge.with_base, dtype)
    for tensor in models[-1].values():
        tensor.view(-1)[0] = float("nan")
    merged = merged_by_us(tmp_path, merge, models)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in models[0].items()}


# Parameters that are wrong before anything is read


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        (
            Merge("multislerp", ({"weight": 0.5}, {"weight": -0.5}), with_base=False),
            ("weights for tensor 't0.weight' sum to 0", "normalize_weights", "change a `weight`"),
        ),
        (
            Merge("multislerp", ({"weight": 0},) * 3, {"normalize_weights": False}, with_base=False),
            ("every weight for tensor 't0.weight' is 0", "change a `weight`"),
        ),
        (
            Merge("nuslerp", ({"weight": 1},) * 3, with_base=False),
            ("takes exactly 2 models, the base not counted", "has 3", "remove models"),
        ),
        (
            Merge("nuslerp", ({"weight": 1},)),
            ("takes exactly 2 models, the base not counted", "has 1", "add models"),
        ),
        (Merge("arcee_fusion", ({}, {})), ("takes exactly 2 models, the base counted", "has 3", "remove models")),
        (Merge("karcher", ({}, {}), {"max_iter": 2.5}, False), ("'max_iter' must be a whole number, not 2.5",)),
        (Merge("karcher", ({}, {}), {"max_iter": -1}, False), ("'max_iter' must be at least 0, not -1",)),
        (Merge("karcher", ({}, {}), {"max_iter": 101}, False), ("at most 100 steps", "set it to 100 or less")),
        (Merge("karcher", ({}, {}), {"tol": -1}, False), ("'tol' must be at least 0",)),
        (Merge("sce", ({}, {}), {"select_topk": 1.5}), ("'select_topk' must be between 0 and 1",)),
    ],
    ids=str,
)
def test_parameters_that_leave_nothing_to_merge_are_refused(
    tmp_path: Path, merge: Merge, words: tuple[str, ...]
) -> None:
    models = random_models(len(merge.per_expert) + merge.with_base, F32)
    with pytest.raises(RecipeError) as caught:
        merged_by_us(tmp_path, merge, models)
    assert all(word in str(caught.value) for word in words), str(caught.value)
