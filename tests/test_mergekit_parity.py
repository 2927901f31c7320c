"""Every method equals mergekit 0.1.5 bit for bit, outside what mergekit leaves to chance.

Three things are left to chance, or to the machine, and are fixed for these comparisons (see ``oracle``): which of
several equal magnitudes survives a density, which elements a random mask keeps, and the rounding of long float32 sums.
``test_mergekit_untouched`` specifies what happens without fixing them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, llama_tensors, write_model
from examples import METHODS, Families, FamilyKind, experts
from oracle import mergekit_merge, nothing_left_to_chance
from recipes import Merge, recipe_document
from tensors import differing, merge_by_mergefs

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WORK_DTYPES = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])

EVERY_METHOD = pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)


def assert_equal_to_mergekit(directory: Path, document: Mapping[str, Any]) -> None:
    """Demand the same tensors, shapes, dtypes and bits.

    ramplus_tl and arcee_fusion are written by mergekit as float32 where no dtype says otherwise; ours have the dtype of
    their inputs.
    """
    with nothing_left_to_chance(document["merge_method"]):
        theirs = mergekit_merge(document)
    ours = merge_by_mergefs(directory, document)
    if document["merge_method"] in ("ramplus_tl", "arcee_fusion"):
        theirs = {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
    assert differing(ours, theirs) == {}


def all_kinds() -> list[FamilyKind]:
    kinds = [FamilyKind(d, tied, shards) for d in (BF16, F32) for tied in (True, False) for shards in (1, 3)]
    return [*kinds, FamilyKind(F16, False, 1)]


@EVERY_METHOD
@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.text)
def test_every_method_equals_mergekit_on_every_kind_of_family(
    tmp_path: Path, families: Families, merge: Merge, kind: FamilyKind
) -> None:
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(kind)))


@EVERY_METHOD
@WORK_DTYPES
def test_tensors_of_several_blocks_equal_mergekit(
    tmp_path: Path, families: Families, merge: Merge, dtype: torch.dtype
) -> None:
    family = families(FamilyKind(dtype, tied=True, hidden=128, layers=1, vocabulary=10007))
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, family))


# Parameters


LINEAR_CASES = {
    "one model": Merge("linear", experts((0.3,)), {"normalize": False}, with_base=False),
    "negative, zero and large weights": Merge("linear", experts((0.4,), (-0.2,), (0.0,), (1.5,)), with_base=False),
    "not normalised": Merge("linear", experts((0.4,), (-0.2,), (1.5,)), {"normalize": False}, with_base=False),
    "weights that no float holds exactly": Merge("linear", experts((0.1,), (0.2,), (0.7,)), with_base=False),
}
TASK_CASES = {
    "one expert": Merge("task_arithmetic", experts((1.7,))),
    "negative and zero weights": Merge("task_arithmetic", experts((-0.5,), (0.0,))),
    "lambda": Merge("task_arithmetic", experts((0.7,), (0.2,), (0.4,)), {"lambda": 0.3}),
    "lambda zero": Merge("task_arithmetic", experts((0.7,), (0.2,)), {"lambda": 0.0}),
    "normalised": Merge("task_arithmetic", experts((0.7,), (0.2,), (0.4,), (1.3,)), {"normalize": True}),
    "normalised by a sum of zero": Merge("task_arithmetic", experts((0.5,), (-0.5,)), {"normalize": True}),
    "int8_mask": Merge("task_arithmetic", experts((0.7,), (0.2,)), {"int8_mask": True}),
}


def pruned_cases(method: str) -> dict[str, Merge]:
    """Return cases for the methods that prune by a density."""
    return {
        f"{method}: one expert": Merge(method, experts((1.7, 0.5))),
        f"{method}: no density given": Merge(method, experts((0.7,), (0.4,))),
        f"{method}: all and nothing": Merge(method, experts((0.7, 1.0), (0.4, 0.0))),
        f"{method}: nothing at all": Merge(method, experts((0.7, 0.0))),
        f"{method}: almost nothing": Merge(method, experts((0.7, 1e-5), (0.9, 0.001))),
        f"{method}: negative and zero weights": Merge(method, experts((0.7, 0.5), (-0.3, 0.4), (0.0, 0.5))),
        f"{method}: four experts": Merge(method, experts((0.7, 0.5), (0.4, 0.3), (1.2, 0.9), (0.2, 0.123))),
        f"{method}: normalised": Merge(method, experts((0.7, 0.5), (0.4, 0.3), (0.9, 0.2)), {"normalize": True}),
        f"{method}: not normalised": Merge(method, experts((0.7, 0.5), (0.4, 0.3)), {"normalize": False}),
        f"{method}: lambda": Merge(method, experts((0.7, 0.5), (0.4, 0.3)), {"lambda": 1.3}),
        f"{method}: rescaled": Merge(method, experts((0.7, 0.5), (0.4, 0.3)), {"rescale": True}),
        f"{method}: not rescaled": Merge(method, experts((0.7, 0.5), (0.4, 0.3)), {"rescale": False}),
        f"{method}: int8_mask": Merge(method, experts((0.7, 0.5), (0.4, 0.3)), {"int8_mask": True}),
    }


def outlier_cases(method: str) -> dict[str, Merge]:
    """Return cases for the methods that drop the largest elements too."""
    names = ("weight", "density", "gamma")
    bands = {
        "no outliers dropped": (0.7, 0.5, 0.0),
        "many outliers dropped": (0.7, 0.3, 0.4),
        "more to drop than the density leaves": (0.7, 0.9, 0.3),
        "almost nothing kept": (0.7, 1e-5, 0.1),
        "the default of gamma": (0.7, 0.5),
    }
    second = {"weight": 0.4, "density": 0.6, "gamma": 0.02}
    return {
        f"{method}: {title}": Merge(method, (dict(zip(names, values, strict=False)), second))
        for title, values in bands.items()
    }


def ranked_cases(method: str) -> dict[str, Merge]:
    """Return cases for the methods that drop at random by rank."""
    first = {"weight": 0.7, "density": 0.5, "epsilon": 0.4}
    seconds = {
        "all and nothing": ({"weight": 0.4, "density": 1.0}, {"weight": 0.3, "density": 0.0}),
        "no epsilon": ({"weight": 0.4, "density": 0.2, "epsilon": 0.0},),
        "the default of epsilon": ({"weight": 0.4, "density": 0.7},),
    }
    cases = {f"{method}: {title}": Merge(method, (first, *second)) for title, second in seconds.items()}
    for name, value in (("rescale", False), ("normalize", True), ("normalize", False), ("lambda", 0.3)):
        cases[f"{method}: {name} {value}"] = Merge(method, (first, {"weight": 0.4, "density": 0.6}), {name: value})
    return cases


NEARSWAP_CASES = {f"nearswap at {t}": Merge("nearswap", ({},), {"t": t}) for t in (0, 1e-7, 0.01, 5)}
RAM_PLUS_CASES = {
    f"ramplus_tl of {count} with {shared}": Merge("ramplus_tl", ({},) * count, shared)
    for count, shared in ((1, {}), (2, {"epsilon": 0.01, "r": 0.5}), (4, {"alpha": 3.0, "r": 2.0, "epsilon": 0.02}))
}
STOCK_CASES = {
    f"model_stock of {count}{' by rows' * rows}": Merge("model_stock", ({},) * count, {"filter_wise": rows})
    for count in (2, 3, 4)
    for rows in (False, True)
}
RAM_CASES = {
    f"ram of {count} with {shared}": Merge("ram", ({},) * count, shared)
    for count, shared in ((1, {}), (3, {"epsilon": 0.01}), (4, {"epsilon": 0.0}))
}
PARTS = {
    "the whole tensor": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "the whole tensor whatever the rows": {"nuslerp_flatten": True, "nuslerp_row_wise": True},
}
NUSLERP_CASES = {
    f"nuslerp of {part}{' of deltas' * based}": Merge("nuslerp", experts((0.6,), (0.3,)), shared, based)
    for part, shared in PARTS.items()
    for based in (True, False)
} | {
    f"nuslerp with weights {weights}": Merge("nuslerp", experts(*((weight,) for weight in weights)))
    for weights in ((0, 1), (1, 0), (-0.3, 0.9), (0.4, -0.4), (0, 0), (0.1, 0.7))
}
MULTISLERP_CASES = {
    "multislerp of one": Merge("multislerp", experts((0.4,)), with_base=False),
    "multislerp of one with a base": Merge("multislerp", experts((0.4,))),
    "multislerp of two deltas": Merge("multislerp", experts((0.4,), (0.7,))),
    "multislerp of three": Merge("multislerp", experts((0.4,), (0.7,), (0.1,)), with_base=False),
    "multislerp of four": Merge("multislerp", experts((0.4,), (0.7,), (0.0,), (-0.3,)), with_base=False),
    "multislerp of weights as they are": Merge(
        "multislerp", experts((1.4,), (0.7,), (0.9,)), {"normalize_weights": False}, with_base=False
    ),
    "multislerp of small weights as they are": Merge(
        "multislerp", experts((0.01,), (0.02,)), {"normalize_weights": False}
    ),
    "multislerp of two that cancel": Merge(
        "multislerp", experts((0.5,), (-0.5,)), {"normalize_weights": False, "eps": 0.5}, with_base=False
    ),
    "multislerp of nothing": Merge("multislerp", experts((0.0,), (0.0,)), {"normalize_weights": False}),
    "multislerp with eps": Merge("multislerp", experts((0.4,), (0.7,)), {"eps": 0.01}, with_base=False),
}
KARCHER_CASES = {
    f"karcher of {count}{' and a base' * based} with {shared}": Merge("karcher", ({},) * count, shared, based)
    for count, based, shared in (
        (1, False, {}),
        (2, False, {}),
        (2, True, {}),
        (4, False, {"tol": 1e-3}),
        (3, False, {"max_iter": 0}),
        (3, True, {"max_iter": 1}),
        (2, False, {"max_iter": 3, "tol": 1e-9}),
        (2, False, {"tol": 5}),
        (3, True, {"tol": 1e9}),
    )
}
SCE_CASES = {
    f"sce of {count} with {shared}": Merge("sce", ({},) * count, shared)
    for count, shared in (
        (1, {}),
        (1, {"select_topk": 0.5}),
        (2, {}),
        (2, {"select_topk": 0}),
        (2, {"select_topk": 1e-6}),
        (2, {"select_topk": 0.999}),
        (3, {"select_topk": 0.3, "int8_mask": True}),
        (4, {"select_topk": 0.1}),
    )
}
SLERP_CASES = {f"slerp at {t}": Merge("slerp", ({},), {"t": t}) for t in (0, 0.5, 0.9, 1, 1.3)}
PASSTHROUGH_CASES = {
    f"scale {scale}": Merge("passthrough", ({"scale": scale},), with_base=False) for scale in (1, -1.7, 0, 3e-3)
} | {"no scale": Merge("passthrough", ({},), with_base=False)}
CASES = {
    **LINEAR_CASES,
    **TASK_CASES,
    **pruned_cases("ties"),
    **pruned_cases("dare_linear"),
    **pruned_cases("dare_ties"),
    **pruned_cases("breadcrumbs"),
    **pruned_cases("breadcrumbs_ties"),
    **outlier_cases("breadcrumbs"),
    **outlier_cases("breadcrumbs_ties"),
    **ranked_cases("della"),
    **ranked_cases("della_linear"),
    **NEARSWAP_CASES,
    **RAM_CASES,
    **RAM_PLUS_CASES,
    **STOCK_CASES,
    **NUSLERP_CASES,
    **MULTISLERP_CASES,
    **KARCHER_CASES,
    **SCE_CASES,
    **SLERP_CASES,
    **PASSTHROUGH_CASES,
}


@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
@WORK_DTYPES
def test_every_parameter_means_what_it_means_to_mergekit(
    tmp_path: Path, families: Families, merge: Merge, dtype: torch.dtype
) -> None:
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(FamilyKind(dtype, experts=4))))


@WORK_DTYPES
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_sums_of_many_experts_are_rounded_as_by_mergekit(
    tmp_path: Path, families: Families, name: str, dtype: torch.dtype
) -> None:
    """``test_mergekit_untouched`` has what torch does where sizes are no multiples of its vectors; here they are."""
    merge = Merge(name, experts(*((0.1 + 0.17 * i, 0.9 - 0.1 * i) for i in range(7))), with_base=name != "linear")
    if name == "linear":
        merge = replace(merge, per_expert=tuple({"weight": p["weight"]} for p in merge.per_expert))
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(FamilyKind(dtype, experts=7, hidden=64))))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_base_may_be_listed_among_the_models(tmp_path: Path, families: Families, name: str, place: int) -> None:
    family = families(FamilyKind())
    document = recipe_document(METHODS[name], family)
    document["models"].insert(place, {"model": str(family.base)})
    assert_equal_to_mergekit(tmp_path, document)


def test_the_base_of_a_linear_merge_is_one_more_input(tmp_path: Path, families: Families) -> None:
    family = families(FamilyKind(F32))
    document = recipe_document(METHODS["linear"], family) | {"base_model": str(family.base)}
    document["models"].append({"model": str(family.base), "parameters": {"weight": 0.45}})
    assert_equal_to_mergekit(tmp_path, document)


LAYERED = {
    "a gradient of weights": {"models": [{"weight": [0.1, 0.9]}, {"weight": [0.8, 0.3, 0.6]}]},
    "a gradient of densities": {"models": [{"weight": 0.6, "density": [0.2, 1.0]}, {"weight": 0.7, "density": 0.4}]},
    "filters on weights": {
        "models": [
            {"weight": [{"filter": "self_attn", "value": 0.9}, {"filter": "mlp", "value": [0.2, 0.7]}, {"value": 0.5}]},
            {"weight": 0.4, "density": [{"filter": "layers.1.", "value": 0.3}, {"value": [0.9, 0.5]}]},
        ]
    },
    "parameters for all models": {"models": [{}, {"weight": 0.2}], "parameters": {"weight": [0.5, 1], "density": 0.4}},
    "a filter on lambda": {
        "models": [{"weight": 0.6}, {"weight": 0.7}],
        "parameters": {"lambda": [{"filter": "lm_head", "value": 0}, {"value": [0.5, 1.5]}]},
    },
}


@pytest.mark.parametrize("parameters", LAYERED.values(), ids=LAYERED)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_gradients_and_filters_reach_the_tensors_that_they_reach_in_mergekit(
    tmp_path: Path, families: Families, method: str, parameters: Mapping[str, Any]
) -> None:
    merge = Merge(method, tuple(parameters["models"]), parameters.get("parameters", {}))
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(FamilyKind(layers=4))))


@pytest.mark.parametrize(
    "t", [[0, 1], [{"filter": "self_attn", "value": [0.1, 0.9, 0.4]}, {"filter": "mlp", "value": 1}, {"value": 0.5}]]
)
@WORK_DTYPES
def test_a_gradient_of_t_reaches_the_tensors_that_it_reaches_in_mergekit(
    tmp_path: Path, families: Families, t: object, dtype: torch.dtype
) -> None:
    family = families(FamilyKind(dtype, layers=4))
    assert_equal_to_mergekit(tmp_path, recipe_document(Merge("slerp", ({},), {"t": t}), family))


# Element types


@EVERY_METHOD
@pytest.mark.parametrize(
    ("stored", "dtype", "out_dtype"),
    [
        (BF16, "float32", None),
        (BF16, "float32", "bfloat16"),
        (BF16, "float32", "float16"),
        (BF16, "float16", None),
        (F32, "bfloat16", None),
        (F32, "float16", "float32"),
        (F32, None, "bfloat16"),
        (F32, None, "float16"),
        (F16, "bfloat16", "float16"),
    ],
    ids=str,
)
def test_merges_compute_and_are_written_in_the_dtypes_of_the_recipe(
    tmp_path: Path, families: Families, merge: Merge, stored: torch.dtype, dtype: str | None, out_dtype: str | None
) -> None:
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(FamilyKind(stored)), dtype, out_dtype))


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "passthrough"])
@pytest.mark.parametrize("out_dtype", [None, "float32", "bfloat16"])
def test_float64_is_computed_as_by_mergekit(
    tmp_path: Path, families: Families, name: str, out_dtype: str | None
) -> None:
    family = families(FamilyKind(F32))
    assert_equal_to_mergekit(tmp_path, recipe_document(METHODS[name], family, "float64", out_dtype))


def custom_family(directory: Path, change: Callable[[int, str, torch.Tensor], torch.Tensor]) -> Family:
    """Write a base (number 0) and two experts whose tensors are ``change(number, name, tensor of the base)``."""
    base = llama_tensors(7, F32)
    paths = []
    for number in range(3):
        tensors = {name: change(number, name, tensor.clone()) for name, tensor in base.items()}
        dtype = next(iter(tensors.values())).dtype
        paths.append(write_model(directory / str(number), tensors, llama_config(dtype)))
    return Family(paths[0], tuple(paths[1:]))


def nudged(number: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a random delta of this model."""
    generator = torch.Generator().manual_seed(number * 1000 + len(name) + tensor.numel())
    return tensor + 0.01 * number * torch.randn(tensor.shape, generator=generator)


@EVERY_METHOD
@pytest.mark.parametrize("odd_one", [0, 1, 2])
def test_inputs_of_different_dtypes_are_promoted_as_by_mergekit(tmp_path: Path, merge: Merge, odd_one: int) -> None:
    family = custom_family(
        tmp_path, lambda number, name, tensor: nudged(number, name, tensor).to(F32 if number == odd_one else BF16)
    )
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, family))


@EVERY_METHOD
def test_models_that_mix_dtypes_of_their_own_are_promoted_tensor_by_tensor(tmp_path: Path, merge: Merge) -> None:
    family = custom_family(
        tmp_path,
        lambda number, name, tensor: nudged(number, name, tensor).to(F32 if "norm" in name and number != 1 else BF16),
    )
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, family))


@EVERY_METHOD
@WORK_DTYPES
def test_zeros_keep_their_signs_as_in_mergekit(tmp_path: Path, merge: Merge, dtype: torch.dtype) -> None:
    def with_zeros(number: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = nudged(number, name, tensor).to(dtype)
        flat = tensor.view(-1)
        for first, zero in ((0, -0.0), (1, 0.0), (number + 2, -0.0)):
            flat[first::7] = zero
        return tensor

    assert_equal_to_mergekit(tmp_path, recipe_document(merge, custom_family(tmp_path, with_zeros)))


@EVERY_METHOD
@WORK_DTYPES
def test_experts_that_equal_the_base_are_merged_as_by_mergekit(
    tmp_path: Path, merge: Merge, dtype: torch.dtype
) -> None:
    family = custom_family(
        tmp_path, lambda number, name, tensor: (nudged(number, name, tensor) if number == 2 else tensor).to(dtype)
    )
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, family))


@WORK_DTYPES
def test_slerp_of_nearly_parallel_tensors_is_a_straight_line_and_equals_untouched_mergekit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    family = custom_family(
        tmp_path, lambda number, name, tensor: (tensor + (nudged(number, name, tensor) - tensor) / 16).to(dtype)
    )
    document = recipe_document(METHODS["slerp"], replace(family, experts=family.experts[:1]))
    assert differing(merge_by_mergefs(tmp_path, document), mergekit_merge(document)) == {}
