"""Every method equals mergekit 0.1.5 bit for bit, outside what mergekit leaves to chance.

Three things are left to chance, or to the machine, and are fixed for these comparisons (see ``oracle``): which of
several equal magnitudes survives a density, which elements a random mask keeps, and the rounding of long float32 sums.
What happens without fixing them is specified at the end.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, llama_tensors, write_model
from examples import METHODS, Families, FamilyKind
from oracle import cosine, lowest_indices_first, mergekit_merge, nothing_left_to_chance, our_random_masks
from recipes import Merge, recipe_document, write_document
from tensors import Tensors, bits, differing, load_model, unit_in_the_last_place

import mergefs
from mergefs.kernels.precision import Precision, load
from mergefs.methods.contract import MagnitudeRescale, MagnitudeThreshold, Threshold
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.reader import SourceReader
from mergefs.statistics.service import StatisticsService

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WORK_DTYPES = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])

EVERY_METHOD = pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)


def merge_by_mergefs(directory: Path, document: Mapping[str, Any], **options: Any) -> Tensors:
    """Return all tensors of the merged model, through ``mergefs.open``."""
    with mergefs.open(write_document(directory / "recipe.yml", document), **options) as model:
        return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)


def assert_equal_to_mergekit(directory: Path, document: Mapping[str, Any]) -> None:
    """Demand the same tensors, shapes, dtypes and bits."""
    with nothing_left_to_chance(document["merge_method"]):
        theirs = mergekit_merge(document)
    assert differing(merge_by_mergefs(directory, document), theirs) == {}


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


def experts(*parameters: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    return tuple(dict(zip(("weight", "density"), values, strict=False)) for values in parameters)


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
    **SLERP_CASES,
    **PASSTHROUGH_CASES,
}


@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
@WORK_DTYPES
def test_every_parameter_means_what_it_means_to_mergekit(
    tmp_path: Path, families: Families, merge: Merge, dtype: torch.dtype
) -> None:
    assert_equal_to_mergekit(tmp_path, recipe_document(merge, families(FamilyKind(dtype, experts=4))))


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


# Ties at a threshold


def tensor_of(model: Path, name: str) -> torch.Tensor:
    return load_model(model)[name]


@WORK_DTYPES
def test_untouched_mergekit_differs_from_ties_only_where_magnitudes_equal_a_threshold(
    tmp_path: Path, families: Families, dtype: torch.dtype
) -> None:
    family = families(FamilyKind(dtype))
    document = recipe_document(METHODS["ties"], family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, tuned = load_model(family.base), [load_model(path) for path in family.experts]
    for name in ours:
        tied = torch.zeros(ours[name].shape, dtype=torch.bool)
        for expert, model in zip(tuned, document["models"], strict=True):
            magnitudes = (expert[name] - base[name]).abs()
            keep = max(1, int(model["parameters"]["density"] * magnitudes.numel()))
            threshold = magnitudes.flatten().float().sort(descending=True).values[keep - 1]
            if (magnitudes.float() >= threshold).sum() > keep:
                tied |= magnitudes.float() == threshold
        differs = bits(ours[name]) != bits(theirs[name])
        assert not (differs & ~tied).any(), name


@WORK_DTYPES
@pytest.mark.parametrize("density", [1e-5, 0.1, 0.5, 0.9])
def test_a_density_keeps_as_many_as_mergekit_and_the_lowest_indices_of_those_tied(
    tmp_path: Path, families: Families, dtype: torch.dtype, density: float
) -> None:
    family = families(FamilyKind(dtype))
    document = recipe_document(Merge("ties", experts((1.0, density))), family)
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        reader = SourceReader(Ledger())
        service = StatisticsService(model._resources.catalog, reader)
        for plan in model.plan.tensors.values():
            context = plan.context
            assert context is not None
            keep = max(1, int(density * context.size))
            wanted = MagnitudeThreshold(context.experts[0], keep)
            limit = service.answers((wanted,), plan.places, context.base, plan.compute).values[wanted]
            assert isinstance(limit, Threshold)
            expert, base = (
                load(place.read(reader, 0, context.size, Purpose.ANALYSIS), place.tensor.dtype, plan.compute)
                for place in plan.places
            )
            precision = Precision(plan.compute)
            delta = precision.round(expert - base)
            keys = torch.from_numpy(precision.magnitude_keys(delta).astype("int64"))
            kept = (keys > limit.key) | ((keys == limit.key) & (torch.arange(context.size) < limit.cut))
            order = torch.sort(torch.from_numpy(abs(delta)), descending=True, stable=True).indices
            assert sorted(order[:keep].tolist()) == kept.nonzero().flatten().tolist(), plan.name
        reader.close()


@WORK_DTYPES
def test_the_rescaling_of_ties_differs_from_untouched_mergekit_by_one_rounding_of_the_factor(
    tmp_path: Path, families: Families, dtype: torch.dtype
) -> None:
    """mergekit sums magnitudes in float32, in an order that depends on the machine."""
    family = families(FamilyKind(dtype))
    merge = Merge("ties", experts((1.0, 0.4)), {"rescale": True, "normalize": False})
    document = recipe_document(merge, family)
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        reader = SourceReader(Ledger())
        service = StatisticsService(model._resources.catalog, reader)
        base, expert = load_model(family.base), load_model(family.experts[0])
        for name, plan in model.plan.tensors.items():
            context = plan.context
            assert context is not None
            keep = int(0.4 * context.size)
            wanted = MagnitudeRescale(context.experts[0], keep)
            answer = service.answers((wanted,), plan.places, context.base, plan.compute).values[wanted]
            delta = (expert[name] - base[name]).abs()
            order = torch.sort(delta.flatten().float(), descending=True, stable=True).indices
            mask = torch.zeros(context.size, dtype=dtype)
            mask[order[:keep]] = 1
            whole, kept = delta.sum(), (delta * mask.reshape(delta.shape)).sum()
            theirs = whole / kept if whole >= 1e-7 else torch.ones((), dtype=dtype)
            assert isinstance(answer, float)
            ours = torch.tensor(answer, dtype=dtype)
            assert abs(ours.double() - theirs.double()) <= 2 * unit_in_the_last_place(theirs), name
        reader.close()


# Random masks


def kept_share(merged: Tensors, base: Tensors, expert: Tensors) -> tuple[int, int]:
    """Return how many of the elements that an expert changed are still changed in a merge, and how many these are."""
    changed = {name: expert[name] != base[name] for name in base}
    kept = sum(int((merged[name] != base[name])[changed[name]].sum()) for name in base)
    return kept, sum(int(mask.sum()) for mask in changed.values())


@pytest.mark.parametrize("density", [0.05, 0.5, 0.93])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_keep_the_share_that_mergekit_keeps_and_leave_the_sum_as_it_is(
    tmp_path: Path, families: Families, method: str, density: float
) -> None:
    """Both must lie within five standard deviations of what the density says."""
    family = families(FamilyKind(F32, hidden=128, layers=1, vocabulary=2000))
    document = recipe_document(Merge(method, experts((1.0, density)), {"normalize": False}), family)
    base, expert = load_model(family.base), load_model(family.experts[0])
    torch.manual_seed(1)
    for merged in (merge_by_mergefs(tmp_path, document), mergekit_merge(document)):
        kept, changed = kept_share(merged, base, expert)
        assert abs(kept - density * changed) < 5 * math.sqrt(changed * density * (1 - density))
        deltas = torch.cat([(expert[name] - base[name]).double().flatten() for name in base])
        after = torch.cat([(merged[name] - base[name]).double().flatten() for name in base])
        deviation = math.sqrt(float((deltas**2).sum()) * (1 - density) / density)
        assert abs(float(after.sum() - deltas.sum())) < 5 * deviation


def test_the_seed_the_expert_and_the_tensor_choose_the_mask_and_nothing_else_does(
    tmp_path: Path, families: Families
) -> None:
    family = families(FamilyKind(F32))
    document = recipe_document(METHODS["dare_linear"], family)
    first = merge_by_mergefs(tmp_path, document)
    assert differing(merge_by_mergefs(tmp_path, document, random_seed=0), first) == {}
    seeded = merge_by_mergefs(tmp_path, document, random_seed=5)
    assert differing(seeded, first).keys() == first.keys() - {"model.norm.weight"}  # which no expert has changed
    with our_random_masks(seed=5):
        assert differing(seeded, mergekit_merge(document)) == {}
    heavier = Merge("dare_linear", tuple({**p, "weight": 2 * p["weight"]} for p in METHODS["dare_linear"].per_expert))
    base = load_model(family.base)
    for name, tensor in merge_by_mergefs(tmp_path, recipe_document(heavier, family)).items():
        assert torch.equal(tensor == base[name], first[name] == base[name])


# The angle of slerp


def slerp_terms(t: float, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two terms whose sum slerp is, in float64; ``t`` enters as the float32 that mergekit makes of it."""
    t = float(torch.tensor(t, dtype=F32))
    angle_cosine = cosine(first, second)
    if abs(angle_cosine) > 0.9995:
        return (1 - t) * first.double(), t * second.double()
    angle = math.acos(angle_cosine)
    factors = [math.sin(share * angle) / math.sin(angle) for share in (1 - t, t)]
    return factors[0] * first.double(), factors[1] * second.double()


def largest_error(values: torch.Tensor, other: torch.Tensor, terms: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest difference, in units in the last place of the largest of the terms and their sum."""
    scale = torch.stack([*terms, terms[0] + terms[1]]).abs().amax(0).to(values.dtype)
    return float(((values.double() - other.double()).abs() / unit_in_the_last_place(scale)).max())


@pytest.mark.parametrize("t", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("hidden", [32, 128])
def test_slerp_in_bfloat16_differs_from_untouched_mergekit_by_at_most_one_unit_in_the_last_place(
    tmp_path: Path, families: Families, t: float, hidden: int
) -> None:
    """Where the two terms cancel, the unit is that of the larger term, since it is that one's rounding that is left."""
    family = families(FamilyKind(BF16, hidden=hidden))
    document = recipe_document(Merge("slerp", ({},), {"t": t}), family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, other = load_model(family.base), load_model(family.experts[0])
    for name in ours:
        assert largest_error(ours[name], theirs[name], slerp_terms(t, base[name], other[name])) <= 1, name


@pytest.mark.parametrize("t", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("hidden", [32, 128])
def test_slerp_in_float32_is_as_near_to_the_formula_as_untouched_mergekit_or_nearer(
    tmp_path: Path, families: Families, t: float, hidden: int
) -> None:
    """mergekit sums the cosine in float32, in an order that depends on CPU and threads.

    The sum is off by more the longer the tensor, so no other program can equal it bit by bit: the angle, and with it
    both factors, differ by some units in the last place. Ours comes from float64 sums. Given the same angle the two are
    equal in every bit, as the tests above show.
    """
    family = families(FamilyKind(F32, hidden=hidden))
    document = recipe_document(Merge("slerp", ({},), {"t": t}), family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, other = load_model(family.base), load_model(family.experts[0])
    for name in ours:
        terms = slerp_terms(t, base[name], other[name])
        exact = terms[0] + terms[1]
        error_of_ours = largest_error(ours[name], exact, terms)
        error_of_theirs = largest_error(theirs[name], exact, terms)
        assert error_of_ours <= 4, name
        assert largest_error(ours[name], theirs[name], terms) <= error_of_ours + error_of_theirs, name


@WORK_DTYPES
def test_slerp_of_nearly_parallel_tensors_is_a_straight_line_and_equals_untouched_mergekit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    family = custom_family(
        tmp_path, lambda number, name, tensor: (tensor + (nudged(number, name, tensor) - tensor) / 16).to(dtype)
    )
    document = recipe_document(METHODS["slerp"], replace(family, experts=family.experts[:1]))
    assert differing(merge_by_mergefs(tmp_path, document), mergekit_merge(document)) == {}


def test_equal_magnitudes_are_common_in_bfloat16_so_the_rule_for_them_matters(
    tmp_path: Path, families: Families
) -> None:
    document = recipe_document(METHODS["ties"], families(FamilyKind(BF16)))
    with lowest_indices_first():
        by_rule = mergekit_merge(document)
    assert differing(mergekit_merge(document), by_rule) != {}
