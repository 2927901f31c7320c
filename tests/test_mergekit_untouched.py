"""How merges differ from those of mergekit as it is: only where mergekit leaves something to chance or to the machine.

``test_mergekit_parity`` shows that nothing differs where these things are fixed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import METHODS, Families, FamilyKind, experts
from oracle import lowest_indices_first, mergekit_merge, one_thread, our_random_masks
from recipes import Merge, recipe_document, write_document
from tensors import Tensors, bits, differing, load_model, merge_by_mergefs, unit_in_the_last_place

import mergefs
from mergefs.checkpoint import dtypes
from mergefs.kernels.precision import Precision, load
from mergefs.kernels.sums import row_sums, sums_across
from mergefs.methods.contract import MagnitudeRescale, MagnitudeThreshold, Threshold
from mergefs.methods.norms import norms_of_rows
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


# Norms and inner products


@dataclass(frozen=True, slots=True)
class Angular:
    """A merge that depends on norms and angles.

    ``furthest`` is how far it may be from untouched mergekit's in float32, in units in the last place of the largest of
    the terms that are added: weighted models, or a base and weighted deltas.
    """

    merge: Merge
    furthest: int

    def largest_terms(self, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the magnitude of the largest term of each element; weights are roughly those of the recipe."""
        weights = [p.get("weight", 1.0) for p in self.merge.per_expert]
        shares = [weight / sum(weights) for weight in weights]
        if self.merge.method == "slerp":
            t = self.merge.parameters["t"]
            terms = [(1 - t) * base, t * experts[0]]
        elif self.merge.with_base:
            terms = [base, *(share * (expert - base) for share, expert in zip(shares, experts, strict=False))]
        else:
            terms = [share * expert for share, expert in zip(shares, experts, strict=False)]
        return torch.stack(terms).abs().amax(0)


ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
ANGULAR = {
    "slerp": Angular(Merge("slerp", ({},), {"t": 0.3}), 4),
    "nuslerp": Angular(Merge("nuslerp", experts((0.6,), (0.3,)), with_base=False), 8),
    "nuslerp of deltas": Angular(Merge("nuslerp", experts((0.6,), (0.3,))), 8),
    "nuslerp by rows": Angular(Merge("nuslerp", experts((0.6,), (0.3,)), ROWS, with_base=False), 8),
    "nuslerp by columns": Angular(Merge("nuslerp", experts((0.6,), (0.3,)), COLUMNS, with_base=False), 8),
    "multislerp": Angular(Merge("multislerp", experts((0.6,), (0.3,), (0.5,)), with_base=False), 0),
    "multislerp of deltas": Angular(Merge("multislerp", experts((0.6,), (0.3,))), 0),
    "karcher": Angular(Merge("karcher", ({}, {}, {}), with_base=False), 16),
    "model_stock": Angular(Merge("model_stock", ({}, {})), 0),
    "model_stock by rows": Angular(Merge("model_stock", ({}, {}), {"filter_wise": True}), 0),
}
KINDS = {
    "small": {"hidden": 32},
    "several blocks": {"hidden": 128, "layers": 1, "vocabulary": 5003, "tied": True},
}
EVERY_ANGULAR = pytest.mark.parametrize("angular", ANGULAR.values(), ids=ANGULAR)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.usefixtures("on_one_thread")
@EVERY_ANGULAR
@EVERY_KIND
def test_norms_and_angles_in_bfloat16_give_what_untouched_mergekit_gives_on_one_thread(
    tmp_path: Path, families: Families, angular: Angular, kind: dict[str, Any]
) -> None:
    """Norms are added up in torch's order; inner products are exact here and round to the same bfloat16 there."""
    document = recipe_document(angular.merge, families(FamilyKind(BF16, experts=3, **kind)))
    assert differing(merge_by_mergefs(tmp_path, document), mergekit_merge(document)) == {}


@pytest.mark.usefixtures("on_one_thread")
@EVERY_ANGULAR
@EVERY_KIND
def test_norms_and_angles_in_float32_differ_from_untouched_mergekit_by_few_units_in_the_last_place(
    tmp_path: Path, families: Families, angular: Angular, kind: dict[str, Any]
) -> None:
    """torch takes sines and arc cosines from its CPU library, which rounds some otherwise: slerp, nuslerp, karcher.

    Inner products are added up in torch's order on one thread, but for those of slerp, of the columns of nuslerp, and
    of karcher. With these things fixed nothing differs, as ``test_mergekit_parity`` shows.
    """
    family = families(FamilyKind(F32, experts=3, **kind))
    document = recipe_document(angular.merge, family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, *others = (load_model(path) for path in (family.base, *family.experts))
    for name in ours:
        largest = torch.maximum(angular.largest_terms(base[name], [other[name] for other in others]), ours[name].abs())
        errors = (ours[name].double() - theirs[name].double()).abs() / unit_in_the_last_place(largest)
        assert float(errors.max()) <= angular.furthest, name


def test_norms_are_those_of_torch_in_bfloat16_and_float32() -> None:
    """To the last bit, for every length that its loops end with, and as far off as torch's are where they are long."""
    generator = torch.Generator().manual_seed(3)
    for dtype, name in ((F32, "F32"), (BF16, "BF16")):
        precision = Precision(getattr(dtypes, name))
        for length in (*range(1, 40), 1003, 300_000):
            rows = torch.randn(3, length, generator=generator).to(dtype)
            found = norms_of_rows(rows.float().numpy(), precision)
            assert found.tolist() == torch.norm(rows, dim=-1).tolist(), (name, length)
    long = torch.randn(2**24, generator=generator)
    (found,) = norms_of_rows(long.numpy()[None], Precision(dtypes.F32))
    assert found == torch.linalg.vector_norm(long).item()
    assert abs(found / long.double().norm().item() - 1) > 1e-4


@pytest.mark.usefixtures("on_one_thread")
def test_sums_are_those_of_torch_in_float32_on_one_thread() -> None:
    """To the last bit, for every length that its loops end with, and where sums have one, two and three levels."""
    generator = torch.Generator().manual_seed(4)
    for length in (*range(140), 511, 512, 1003, 16_383, 16_384 + 33, 300_000, 2**20, 3 * 2**20 + 77):
        rows = torch.randn(3, length, generator=generator) + 0.3
        assert row_sums(rows.numpy()).tolist() == rows.sum(dim=-1).tolist(), length
        assert row_sums(rows[:1].numpy()).tolist() == [rows[0].sum().item()], length
        assert row_sums(rows[:0].numpy()).tolist() == []


@pytest.mark.usefixtures("on_one_thread")
def test_sums_across_vectors_are_those_of_torch_in_float32_on_one_thread() -> None:
    """From whichever element on: torch adds those in the last few places up otherwise."""
    generator = torch.Generator().manual_seed(5)
    for vectors, size in itertools.product((1, 3, 6, 15, 21, 45, 66, 300), (*range(2, 10), 31, 32, 33, 47, 100)):
        values = torch.randn(vectors, size, generator=generator) + 0.3
        cut = int(torch.randint(1, size, (), generator=generator))
        parts = [sums_across(values[:, :cut].numpy(), 0, size), sums_across(values[:, cut:].numpy(), cut, size)]
        assert np.concatenate(parts).tolist() == values.sum(dim=0).tolist(), (vectors, size, cut)
        assert sums_across(values[:, :0].numpy(), 0, size).size == 0


@pytest.mark.usefixtures("on_one_thread")
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_many_experts_in_float32_is_what_untouched_mergekit_makes_of_them_on_one_thread(
    tmp_path: Path, families: Families, filter_wise: bool
) -> None:
    """The mean of the 21 cosines of each row is added up in an order that depends on the row."""
    merge = Merge("model_stock", ({},) * 7, {"filter_wise": filter_wise})
    document = recipe_document(merge, families(FamilyKind(F32, experts=7, hidden=40, vocabulary=99)))
    assert differing(merge_by_mergefs(tmp_path, document), mergekit_merge(document)) == {}


# The selection of sce, and that of arcee_fusion


@WORK_DTYPES
def test_untouched_mergekit_differs_from_sce_only_where_variances_equal_the_threshold(
    tmp_path: Path, families: Families, dtype: torch.dtype
) -> None:
    """Which of the equal ones torch selects is left open."""
    family = families(FamilyKind(dtype))
    document = recipe_document(METHODS["sce"], family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, tuned = load_model(family.base), [load_model(path) for path in family.experts]
    for name in ours:
        deltas = torch.stack([expert[name] - base[name] for expert in tuned])
        variances = deltas.var(dim=0, unbiased=False)
        keep = int(0.4 * int((variances != 0).sum()))
        threshold = variances.flatten().float().sort(descending=True).values[max(keep - 1, 0)]
        tied = variances.float() == threshold
        largest = torch.maximum(base[name].abs(), deltas.abs().amax(0))
        errors = (ours[name].double() - theirs[name].double()).abs() / unit_in_the_last_place(largest)
        # Energies, and so weights, are those of slightly other elements, and are summed in float32 there.
        assert not ((errors > (4 if dtype == F32 else 2)) & ~tied).any(), name


@WORK_DTYPES
def test_untouched_mergekit_takes_over_almost_the_same_changes_in_arcee_fusion(
    tmp_path: Path, families: Families, dtype: torch.dtype
) -> None:
    """The divergence of rows that differ little is made of rounding errors, and torch's exponentials are CPU's own.

    So single elements at the threshold are decided otherwise; every element is the base's or the other model's.
    """
    family = families(FamilyKind(dtype, hidden=64, vocabulary=500))
    document = recipe_document(METHODS["arcee_fusion"], family)
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    base, other = load_model(family.base), load_model(family.experts[0])
    decided_otherwise = taken_over = 0
    for name in ours:
        fused = (base[name].float() + (other[name] - base[name]).float()).to(dtype)
        assert ((ours[name] == base[name]) | (ours[name] == fused)).all(), name
        decided_otherwise += int((ours[name] != theirs[name].to(dtype)).sum())
        taken_over += int((ours[name] != base[name]).sum())
    assert taken_over > 1000
    assert decided_otherwise <= 0.01 * taken_over


def test_mergekit_draws_a_sample_for_the_quartiles_of_large_tensors_and_we_take_all_elements(
    tmp_path: Path, families: Families
) -> None:
    family = families(FamilyKind(F32, tied=True, hidden=128, layers=1, vocabulary=10007))
    document = recipe_document(METHODS["arcee_fusion"], family)
    name = "model.embed_tokens.weight"
    torch.manual_seed(1)
    once = mergekit_merge(document)[name]
    torch.manual_seed(2)
    assert not torch.equal(once, mergekit_merge(document)[name])
    ours = merge_by_mergefs(tmp_path, document)[name]
    assert float((ours != once).double().mean()) < 0.01
