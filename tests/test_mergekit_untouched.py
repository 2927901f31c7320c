"""How merges differ from those of mergekit as it is: only where mergekit leaves something to chance or to the machine.

``test_mergekit_parity`` shows that nothing differs where these things are fixed.
"""

import math
from pathlib import Path

import pytest
import torch
from examples import METHODS, Families, FamilyKind, experts
from oracle import cosine, lowest_indices_first, mergekit_merge, our_random_masks
from recipes import Merge, recipe_document, write_document
from tensors import Tensors, bits, differing, load_model, merge_by_mergefs, unit_in_the_last_place

import mergefs
from mergefs.kernels.precision import Precision, load
from mergefs.methods.contract import MagnitudeRescale, MagnitudeThreshold, Threshold
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.reader import SourceReader
from mergefs.statistics.service import StatisticsService

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WORK_DTYPES = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])


# Ties at a threshold


def test_equal_magnitudes_are_common_in_bfloat16_so_the_rule_for_them_matters(
    tmp_path: Path, families: Families
) -> None:
    document = recipe_document(METHODS["ties"], families(FamilyKind(BF16)))
    with lowest_indices_first():
        by_rule = mergekit_merge(document)
    assert differing(mergekit_merge(document), by_rule) != {}


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
                load(place.read(reader, 0, context.size, Purpose.ANALYSIS), place.dtype, plan.compute)
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


# Sums of many experts


def test_untouched_mergekit_rounds_the_last_elements_of_tensors_otherwise_when_it_adds_many_in_float32(
    tmp_path: Path, families: Families
) -> None:
    """torch adds in the order of the experts as far as its vectors reach, and pairs them up in the elements after that.

    From five experts on this can show in the last bit, in fewer than 64 elements of a tensor, on any CPU.
    """
    merge = Merge("task_arithmetic", experts(*((0.1 + 0.17 * i,) for i in range(7))))
    document = recipe_document(merge, families(FamilyKind(F32, experts=7, hidden=40, vocabulary=99)))
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    for name in ours:
        differs = (bits(ours[name]) != bits(theirs[name])).flatten()
        assert not differs[: differs.numel() // 64 * 64].any(), name
        largest = torch.maximum(ours[name].abs(), theirs[name].abs()).clamp_min(0.01)  # of the deltas
        errors = (ours[name].double() - theirs[name].double()).abs() / unit_in_the_last_place(largest)
        assert float(errors.max()) <= 2, name


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
