"""Plans: what a budget's words mean, which blocks are worth buying, how files are laid out, what an id depends on."""

import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import read_model, write_tensors
from checkpoints import Family, family
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import MERGES, Merge, recipe_document, stand_in, write_document, write_recipe

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.workspace import Workspace
from mergefs.errors import BudgetError, PlanError
from mergefs.methods.contract import NO_ANSWERS
from mergefs.methods.registry import METHODS
from mergefs.planner.allocation import correlations
from mergefs.planner.budget import parse_budget
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.planner.selection import select_blocks
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Role, block_sizes
from mergefs.statistics.blocks import known_deltas


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)


def plan_of(recipe: Path, catalog: Path, **options: object) -> MergePlan:
    with Catalog(catalog) as opened:
        workspace = Workspace.create(opened)
        return make_plan(load_recipe(recipe), replace(PlanOptions(), **options), workspace)  # type: ignore[arg-type]


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "limit"),
    [
        ("0", 1000, 0),
        ("0%", 1000, 0),
        ("25%", 1000, 250),
        (" 33.3 % ", 1000, 333),
        ("99.99%", 1000, 999),
        ("100%", 1001, 1001),
        (".1%", 1000, 1),
        ("33.333333333333333333%", 3 * 10**20, 10**20 - 1),
        ("1024", 10, 1024),
        ("1KiB", 10, 1024),
        ("1.5 kB", 10, 1500),
        ("2GiB", 10, 2**31),
    ],
)
def test_a_budget_is_a_size_or_a_share_rounded_down(text: str, total: int, limit: int) -> None:
    assert parse_budget(text).limit(total) == limit


@given(percent=st.floats(0, 100), total=st.integers(0, 2**60))
@settings(deadline=None)
def test_a_share_lies_between_nothing_and_everything(percent: float, total: int) -> None:
    assert 0 <= parse_budget(f"{percent:f}%").limit(total) <= total


@pytest.mark.parametrize(
    "text", ["-5%", "120%", "lots", "", "%", "nan%", "inf%", "1e400", "1e-1%", "1/3%", "-1", "5 parsecs", "10%%"]
)
def test_what_is_no_budget_is_quoted(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value)


# Which blocks ---------------------------------------------------------------------------------------------------------


def test_what_is_bought_leaves_the_error_that_norms_and_angles_of_the_deltas_say(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models))
    method = METHODS[recipe.method]
    with Catalog(tmp_path / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        draft = draft_plan(recipe, PlanOptions(), workspace)
        analyze_draft(draft, workspace, Silence())
        result = select_blocks(draft.tensors, catalog, workspace.statistics, 20_000)
        total = left = 0.0
        for tensor in result.tensors:
            assert tensor.selection is not None
            assert tensor.context is not None
            assert tensor.stand_in is not None
            experts = [index for index, role in enumerate(tensor.roles) if role is Role.EXPERT]
            assert np.delete(tensor.selection.bought, experts, axis=0).all()
            response = method.response(tensor.context, NO_ANSWERS)
            deltas = [known_deltas(each, tensor.stand_in, tensor.compute, catalog) for each in tensor.places]
            found = [known for index in experts if (known := deltas[index]) is not None]
            equal = np.stack([known.changed == 0 for known in found])
            read, bought = tensor.selection.read[experts], tensor.selection.bought[experts]
            assert not (read & equal).any(), "a block that equals the base's was bought"
            assert (bought == (read | equal)).all()
            lengths = np.stack([np.sqrt(known.squared_norms.astype(np.float64)) for known in found])
            lengths *= np.array(response.factors)[experts, None]
            gram = np.einsum("bij,ib,jb->bij", correlations([known.sketches for known in found]), lengths, lengths)
            total += gram.sum()
            left += np.einsum("bij,ib,jb->", gram, ~bought, ~bought)
    assert 0 < left < total
    assert result.predicted_relative_error == pytest.approx((left / total) ** 0.5, rel=1e-6)
    spent = sum(tensor.planned_expert_bytes for tensor in result.tensors)
    assert 20_000 - 512 < spent <= 20_000


@given(
    size=st.integers(1, 5000),
    step=st.integers(1, 700),
    chosen=st.lists(st.booleans()),
    itemsize=st.sampled_from([2, 4]),
)
@settings(deadline=None)
def test_the_bytes_of_chosen_blocks_are_those_between_their_bounds(
    size: int, step: int, chosen: list[bool], itemsize: int
) -> None:
    grid = BlockGrid(size, step)
    mask = np.resize(np.array(chosen or [False]), grid.count)
    expected = sum(stop - start for (start, stop), is_chosen in zip(grid, mask, strict=True) if is_chosen)
    assert int((block_sizes(grid) * itemsize)[mask].sum()) == expected * itemsize


def test_an_expert_that_equals_the_base_costs_nothing(models: Family, tmp_path: Path) -> None:
    frozen = Path(shutil.copytree(models.base, tmp_path / "frozen"))
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], Family(models.base, (frozen, models.experts[0])))
    outcome = plan_of(recipe, tmp_path / "catalog", budget="99%").outcome
    assert 0 < outcome.expert_bytes_planned < outcome.expert_bytes_total / 2
    assert outcome.predicted_relative_error == 0


def tensor_bytes(tensors: dict[str, torch.Tensor], name: str) -> bytes:
    return tensors[name].contiguous().view(torch.uint8).numpy().tobytes()


def bytes_that_differ(base: Path | None, experts: Sequence[Path]) -> int:
    """Return the bytes of all blocks of experts but those that are the base's, or an earlier expert's."""
    total = 0
    stand_in = None if base is None else read_model(base)
    models = [read_model(expert) for expert in experts]
    for name, tensor in models[0].items():
        size = tensor.element_size()
        for start, stop in BlockGrid.of(tuple(tensor.shape)):
            known = set() if stand_in is None else {tensor_bytes(stand_in, name)[start * size : stop * size]}
            found = {tensor_bytes(model, name)[start * size : stop * size] for model in models}
            total += len(found - known) * (stop - start) * size
    return total


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "linear without a base"])
def test_exactly_the_bytes_that_are_equal_are_saved_and_the_merge_stays_as_it_is(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    made = family(tmp_path / "models", experts=3, dtype=torch.bfloat16, tied=False, shards=1)
    base, (first, second, _) = read_model(made.base), map(read_model, made.experts)
    for number, tensor in enumerate(sorted(base)):
        if number % 2:  # half of the tensors are frozen in the first expert
            first[tensor] = base[tensor].clone()
        rows = len(second[tensor]) // 2
        second[tensor][:rows] = first[tensor][:rows]
        if number % 4 == 0:
            second[tensor] = first[tensor].clone()
    write_tensors(made.experts[0], first)
    write_tensors(made.experts[1], second)
    parameters = tuple({**MERGES[name].per_expert[0], "weight": weight} for weight in (0.6, 0.5, 0.3))
    merge = replace(MERGES[name], per_expert=parameters)
    recipe = write_recipe(tmp_path / "recipe.yml", merge, made)
    open_it = partial(open_model, recipe, base=stand_in(merge, made), catalog=tmp_path / "catalog")
    with open_it() as model:
        everything = model.plan.outcome.expert_bytes_total
        merged = {tensor: model.get_tensor(tensor) for tensor in model.plan.tensors}
        assert model.plan.outcome.expert_bytes_planned == model.bytes_read["expert_bytes_read"] == everything
    with open_it(budget="1%"):  # analyses the family
        differing = bytes_that_differ(made.base, made.experts)
    assert differing < 0.8 * everything
    for budget in (None, "100%", str(differing)):
        with open_it(budget=budget) as model:
            assert all(torch.equal(model.get_tensor(tensor), merged[tensor]) for tensor in merged)
            assert model.plan.outcome.expert_bytes_planned == model.bytes_read["expert_bytes_read"] == differing
            assert model.plan.outcome.predicted_relative_error == 0
    with open_it(budget=str(differing - 1)) as model:
        assert model.plan.outcome.expert_bytes_planned < differing
        assert model.plan.outcome.predicted_relative_error > 0


def test_no_budget_reads_nothing_but_headers(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with Catalog(tmp_path / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        ledger = workspace.ledger
        for budget in (None, "100%"):
            plan = make_plan(load_recipe(recipe), PlanOptions(budget), workspace)
            assert plan.outcome.predicted_relative_error == 0
        assert ledger.totals().analysis_bytes_read == 0
        make_plan(load_recipe(recipe), PlanOptions("50%"), workspace)
        gathered = ledger.totals().analysis_bytes_read
        assert gathered > 0
        make_plan(load_recipe(recipe), PlanOptions("30%"), workspace)
        assert ledger.totals().analysis_bytes_read == gathered


# Tensors --------------------------------------------------------------------------------------------------------------


def test_tensors_come_in_the_order_of_their_names_with_numbers_as_numbers(tmp_path: Path) -> None:
    made = family(tmp_path, experts=1, dtype=torch.bfloat16, tied=False, shards=3, layers=12)
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["slerp"], made)
    names = list(plan_of(recipe, tmp_path / "catalog").tensors)
    assert sorted(names) == list(open_checkpoint(made.base).tensors)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert names[0] == "lm_head.weight"
    assert names[-1] == "model.norm.weight"


def test_whole_number_tensors_are_copied_and_must_agree(models: Family, tmp_path: Path) -> None:
    for model in (models.base, *models.experts):
        write_tensors(model, read_model(model) | {"model.ids": torch.arange(10)})
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    with open_model(recipe, catalog=tmp_path / "catalog") as merged:
        assert torch.equal(merged.get_tensor("model.ids"), torch.arange(10))
    write_tensors(models.experts[1], read_model(models.experts[1]) | {"model.ids": torch.arange(10).int()})
    with pytest.raises(PlanError, match=r"'model.ids' is I64 .* must agree"):
        plan_of(recipe, tmp_path / "catalog")


def test_buffers_that_can_be_computed_may_be_missing_or_too_many(models: Family, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_tensors(models.base, read_model(models.base) | {name: torch.arange(4.0)})
    write_tensors(models.experts[0], read_model(models.experts[0]) | {"model.position_ids": torch.arange(4)})
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    plan = plan_of(recipe, tmp_path / "catalog")
    assert plan.tensors[name].context is None
    assert "model.position_ids" not in plan.tensors
    assert any(name in note for note in plan.notes)


@pytest.mark.parametrize("tied_base", [True, False])
def test_an_output_embedding_that_is_the_input_embedding_may_be_missing(tmp_path: Path, tied_base: bool) -> None:
    tied = family(tmp_path / "tied", experts=1, dtype=torch.bfloat16, tied=True, shards=1)
    untied = family(tmp_path / "untied", experts=1, dtype=torch.bfloat16, tied=False, shards=1)
    made = Family((tied if tied_base else untied).base, ((untied if tied_base else tied).experts[0],))
    plan = plan_of(write_recipe(tmp_path / "recipe.yml", MERGES["slerp"], made), tmp_path / "catalog")
    assert ("lm_head.weight" in plan.tensors) is not tied_base
    if tied_base:
        assert any("lm_head.weight" in note and "ties its embeddings" in note for note in plan.notes)
    else:
        names = [place.tensor.name for place in plan.tensors["lm_head.weight"].places]
        assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", [1, 5_000, 40_000, 10**9])
def test_files_hold_every_tensor_once_within_the_shard_size_and_read_as_safetensors(
    models: Family, tmp_path: Path, max_shard_size: int
) -> None:
    from safetensors.torch import load

    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with open_model(recipe, max_shard_size=max_shard_size, catalog=tmp_path / "catalog") as model:
        plan = model.plan
        assert list(itertools.chain.from_iterable(file.tensors for file in plan.files)) == list(plan.tensors)
        for file in plan.files:
            size = sum(plan.tensors[name].nbytes for name in file.tensors)
            assert size <= max_shard_size or len(file.tensors) == 1
            content = model.read_file(file.name)
            assert len(content) == file.size == model.files.sizes[file.name]
            assert struct.unpack("<Q", content[:8])[0] + 8 == file.offsets[0]
            assert file.offsets[0] % 4096 == 0
            for name, tensor in load(content).items():
                assert torch.equal(tensor, model.get_tensor(name))
        if len(plan.files) == 1:
            assert plan.files[0].name == "model.safetensors"
            assert "model.safetensors.index.json" not in model.files.sizes
        else:
            index = json.loads(model.read_file("model.safetensors.index.json"))
            assert index["weight_map"] == {name: file.name for file in plan.files for name in file.tensors}
            assert index["metadata"]["total_size"] == plan.outcome.output_bytes


# Identity -------------------------------------------------------------------------------------------------------------


def test_an_id_depends_on_everything_that_the_bytes_depend_on(models: Family, tmp_path: Path) -> None:
    document = recipe_document(MERGES["ties"], models)
    swapped = document | {"models": document["models"][::-1]}
    heavier = json.loads(json.dumps(document))
    heavier["models"][0]["parameters"]["weight"] = 0.71
    options: list[dict[str, object]] = [
        {},
        {"budget": "0"},
        {"budget": "50%"},
        {"random_seed": 1},
        {"max_shard_size": 10**5},
    ]
    documents = [
        document,
        swapped,
        heavier,
        document | {"dtype": "float32"},
        document | {"dtype": "float32", "out_dtype": "bfloat16"},
        document | {"parameters": {"normalize": False}},
        document | {"merge_method": "dare_ties"},
        document | {"merge_method": "task_arithmetic", "parameters": {}, "models": document["models"]},
    ]
    ids = []
    for number, each in enumerate(documents):
        recipe = write_document(tmp_path / f"{number}.yml", each)
        for chosen in options if number == 0 else [{}, {"budget": "50%"}]:
            ids.append(plan_of(recipe, tmp_path / "catalog", **chosen).plan_id)
    assert len(set(ids)) == len(ids)


def test_an_id_is_local_until_the_contents_are_known(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    unknown = plan_of(recipe, tmp_path / "catalog").plan_id
    assert unknown.startswith("local-")
    assert plan_of(recipe, tmp_path / "catalog").plan_id == unknown
    plan_of(recipe, tmp_path / "catalog", budget="50%")  # gathers statistics, and so the contents
    known = plan_of(recipe, tmp_path / "catalog").plan_id
    assert not known.startswith("local-")
    assert plan_of(recipe, tmp_path / "other catalog").plan_id == unknown


def test_a_plan_is_kept_in_the_catalog_with_its_tensors(models: Family, tmp_path: Path) -> None:
    merge = MERGES["linear without a base"]
    recipe = write_recipe(tmp_path / "recipe.yml", merge, models)
    with Catalog(tmp_path / "catalog") as catalog:
        plan = make_plan(load_recipe(recipe), PlanOptions("50%", stand_in(merge, models)), Workspace.create(catalog))
        record = catalog.plan(plan.plan_id)
        entries = catalog.plan_entries(plan.plan_id)
        again = make_plan(load_recipe(recipe), PlanOptions("50%", stand_in(merge, models)), Workspace.create(catalog))
    assert record is not None
    assert (record.method, record.budget_bytes) == ("linear", plan.outcome.budget_bytes)
    assert record.recipe == recipe.read_text()
    assert [entry.path for entry in record.inputs] == [str(path) for path in (*models.experts, models.base)]
    assert again.created_ns == plan.created_ns == record.created_ns
    assert {entry.name for entry in entries} == set(plan.tensors)
    for entry in entries:
        selection = plan.tensors[entry.name].selection
        assert selection is not None
        assert entry.selection is not None
        assert entry.selection.cell == selection.cell
        assert [zlib.decompress(row) for row in entry.selection.levels] == [row.tobytes() for row in selection.levels]
        assert zlib.decompress(entry.selection.givers) == selection.givers.astype("<i2").tobytes()
        assert entry.selection.computed == np.packbits(selection.computed).tobytes()


def test_a_recipe_means_the_same_whatever_its_directory_is(models: Family, tmp_path: Path) -> None:
    merge = Merge("task_arithmetic", ({"weight": 0.5},))
    document = recipe_document(merge, models)
    absolute = write_document(tmp_path / "a" / "recipe.yml", document)
    document["base_model"] = "base"
    document["models"][0]["model"] = models.experts[0].name
    relative = write_document(models.base.parent / "recipe.yml", document)
    first, second = (plan_of(recipe, tmp_path / "catalog", budget="50%") for recipe in (absolute, relative))
    assert first.plan_id == second.plan_id
