"""Plans by their ids: the catalog keeps all that a plan is made of, and a plan made again is the same to the byte."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from hypothesis import given
from hypothesis import strategies as st
from mounting import mounted_recipes
from recipes import MERGES, recipe_document, stand_in, write_document, write_recipe
from safetensors.torch import load_file, save_file

from mergefs.api import open_model
from mergefs.catalog import Catalog, default_location
from mergefs.catalog.records import PlanRecord
from mergefs.cli import main
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.errors import CatalogError, PlanError, UsageError
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.keeping import recorded_selection, selection_record
from mergefs.planner.levels import EQUAL, WHOLE, Selection
from mergefs.planner.plan import MergePlan
from mergefs.planner.plan_ids import meant_by
from mergefs.planner.targets import find_record, plan_target
from mergefs.recipe.model import load_recipe
from mergefs.sources.blocks import BlockGrid


@pytest.fixture
def models(tmp_path: Path) -> Family:
    return family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=2)


def made(recipe: Path, options: PlanOptions) -> tuple[MergePlan, dict[str, bytes]]:
    """Plan a recipe; return the plan, and all files of the merged model."""
    return _opened(lambda workspace: make_plan(load_recipe(recipe), options, workspace))


def again(plan_id: str) -> tuple[MergePlan, dict[str, bytes]]:
    """Make a kept plan again; return it, and all files of the merged model."""
    return _opened(lambda workspace: plan_target(Path(plan_id), PlanOptions(), workspace))


def _opened(plan: object) -> tuple[MergePlan, dict[str, bytes]]:
    workspace = Workspace.create(Catalog(default_location()))
    try:
        found = plan(workspace)  # type: ignore[operator]
        files = ModelFiles(found, workspace, strict=True)
        return found, {name: files.read(name, 0, size) for name, size in files.sizes.items()}
    finally:
        workspace.close()


def sharded_anew(directory: Path) -> None:
    """Write the same tensors of a model into one file with other times."""
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# The same plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "30%", "70%", None])
@pytest.mark.parametrize("name", MERGES)
def test_a_plan_made_again_without_its_recipe_is_the_same_to_the_byte(
    models: Family, tmp_path: Path, name: str, budget: str | None
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], models)
    assert main(["analyze", str(models.base), *map(str, models.experts)]) == 0
    options = PlanOptions(
        budget, stand_in(MERGES[name], models), random_seed=7, max_shard_size=20_000, copy_tokenizer=False
    )
    plan, files = made(recipe, options)
    recipe.unlink()
    other, same_files = again(plan.plan_id)
    assert other.plan_id == plan.plan_id
    assert other.outcome == plan.outcome
    assert other.options == options
    assert other.created_ns == plan.created_ns
    assert same_files == files
    assert len(plan.files) > 1


def test_a_plan_that_buys_planes_of_deltas_is_made_again_from_them(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    assert main(["analyze", str(recipe), "--planes", "2"]) == 0
    plan, files = made(recipe, PlanOptions("12%"))
    bought = [tensor.selection for tensor in plan.tensors.values() if tensor.selection is not None]
    assert any(((selection.levels > 0) & (selection.levels < EQUAL)).any() for selection in bought)
    recipe.unlink()
    other, same_files = again(plan.plan_id)
    assert (other.plan_id, other.outcome, same_files) == (plan.plan_id, plan.outcome, files)
    for file in (Path(os.environ["MERGEFS_CATALOG"]) / "planes").iterdir():
        file.unlink()
    with pytest.raises(PlanError, match="the planes of its experts' deltas are gone or have been coded anew"):
        again(plan.plan_id)


def test_relative_paths_count_from_where_the_plan_was_made(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the directory that was current then, even where the one that is current now has models of that name."""
    relative = Family(Path("models/base"), (Path("models/expert-1"), Path("models/expert-2")))
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yml", MERGES["ties"], relative)
    monkeypatch.chdir(tmp_path)
    plan, files = made(recipe, PlanOptions("30%"))
    assert main(["materialize", str(recipe), "out", "--budget", "30%"]) == 0
    assert main(["verify", "--deep", "out"]) == 0
    elsewhere = tmp_path / "elsewhere"
    family(elsewhere / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=2, seed=5)
    monkeypatch.chdir(elsewhere)
    assert again(plan.plan_id)[1] == files


def test_a_merge_of_merges_is_made_again_from_all_documents_of_its_file(models: Family, tmp_path: Path) -> None:
    first = recipe_document(MERGES["ties"], models) | {"name": "first"}
    second = {
        "merge_method": "linear",
        "models": [
            {"model": "first", "parameters": {"weight": 0.5}},
            {"model": str(models.experts[1]), "parameters": {"weight": 0.5}},
        ],
    }
    recipe = write_document(tmp_path / "recipe.yml", [first, second])
    plan, files = made(recipe, PlanOptions("40%", str(models.base)))
    recipe.unlink()
    other, same_files = again(plan.plan_id)
    assert (other.plan_id, same_files) == (plan.plan_id, files)


def test_models_that_were_copied_or_sharded_anew_are_known_by_their_contents(models: Family, tmp_path: Path) -> None:
    plan, files = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    for directory in (models.base, *models.experts):
        sharded_anew(directory)
    other, same_files = again(plan.plan_id)
    assert other.plan_id == plan.plan_id
    assert same_files == files


def test_a_plan_that_knew_its_inputs_by_their_files_gets_its_lasting_id_once_they_are_analysed(
    models: Family, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    plan, _ = made(recipe, PlanOptions())
    assert plan.plan_id.startswith("local-")
    assert again(plan.plan_id)[0].plan_id == plan.plan_id
    assert main(["analyze", str(recipe)]) == 0
    other, _ = again(plan.plan_id)
    assert other.plan_id == made(recipe, PlanOptions())[0].plan_id
    assert not other.plan_id.startswith("local-")
    assert any(f"plan {plan.plan_id} is plan {other.plan_id} now" in note for note in other.notes)
    assert plan.asked == other.asked == other.plan_id[:16]


def test_what_is_asked_makes_the_first_half_of_an_id_and_what_the_inputs_hold_the_second(
    models: Family, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    assert main(["analyze", str(recipe)]) == 0
    plan, _ = made(recipe, PlanOptions())
    other, _ = made(recipe, PlanOptions(random_seed=1))
    assert (other.plan_id[:16] != plan.plan_id[:16], other.plan_id[16:]) == (True, plan.plan_id[16:])
    path = models.experts[0] / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    touched, _ = made(recipe, PlanOptions())
    assert touched.plan_id.startswith(f"local-{plan.asked}")
    assert main(["analyze", str(recipe)]) == 0
    changed, _ = made(recipe, PlanOptions())
    assert (changed.asked, changed.plan_id[16:] != plan.plan_id[16:]) == (plan.asked, True)
    other_way = Family(models.base, models.experts[::-1])
    swapped, _ = made(write_recipe(tmp_path / "swapped.yml", MERGES["task_arithmetic"], other_way), PlanOptions())
    assert (swapped.asked, swapped.plan_id != plan.plan_id) == (plan.asked, True)


def test_the_structure_of_an_input_is_part_of_what_is_asked(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    plan, _ = made(recipe, PlanOptions())
    sharded_anew(models.experts[0])
    assert made(recipe, PlanOptions())[0].asked == plan.asked
    path = models.experts[0] / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert made(recipe, PlanOptions())[0].asked != plan.asked


def test_a_merge_of_merges_gets_its_lasting_id_once_its_inputs_are_analysed(models: Family, tmp_path: Path) -> None:
    first = recipe_document(MERGES["ties"], models) | {"name": "first"}
    second = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 0.5}}]}
    recipe = write_document(tmp_path / "recipe.yml", [first, second])
    plan, _ = made(recipe, PlanOptions())
    assert plan.plan_id.startswith("local-")
    assert main(["analyze", str(recipe)]) == 0
    other, _ = again(plan.plan_id)
    assert other.plan_id == made(recipe, PlanOptions())[0].plan_id
    assert other.plan_id.startswith(plan.asked)


def test_a_plan_that_was_named_by_other_rules_says_so(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    with Catalog(default_location()) as catalog:
        record = catalog.plan(plan.plan_id)
        assert record is not None
        older = {name: value for name, value in record.made_by.items() if name != "ids"}
        catalog.keep_plan(
            _changed(record, made_by=older, plan_id="0" * 32),
            catalog.plan_entries(plan.plan_id),
        )
    with pytest.raises(PlanError, match=r"kept by a version of mergefs that named plans otherwise; plan .* anew"):
        again("0" * 32)


@given(st.data())
def test_what_is_kept_of_a_selection_is_all_of_it(data: st.DataObject) -> None:
    grid, inputs = BlockGrid(data.draw(st.integers(1, 40)), 4), data.draw(st.integers(1, 3))
    cell = data.draw(st.sampled_from([1, 2, 4]))
    cells = BlockGrid(grid.size, cell).count
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    chosen = Selection(
        grid,
        cell,
        draw.choice(np.array([0, 1, 2, EQUAL, WHOLE], dtype=np.uint8), (inputs, cells)),
        draw.integers(0, inputs, (inputs, grid.count)).astype(np.int16),
        draw.random(grid.count) < 0.5,
    )
    found = recorded_selection(selection_record(chosen), grid)
    assert (found.grid, found.cell) == (grid, cell)
    for name in ("levels", "givers", "computed"):
        own, kept = getattr(chosen, name), getattr(found, name)
        assert own.dtype == kept.dtype
        assert np.array_equal(own, kept)


# What has changed is told ---------------------------------------------------------------------------------------------


def test_an_input_that_has_changed_is_named(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    file = sorted(models.experts[1].glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"expert-2.* is not what it was .*restore it, or plan .*recipe\.yml anew"):
        again(plan.plan_id)


def test_an_input_that_has_changed_before_it_was_analysed_is_named_too(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions())
    sharded_anew(models.experts[0])
    with pytest.raises(PlanError, match=r"expert-1.* is not what it was"):
        again(plan.plan_id)


def test_a_tensor_that_has_gone_is_named(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    for directory in (models.base, *models.experts):
        tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
        for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
            file.unlink()
        del tensors["model.norm.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"tensor 'model\.norm\.weight' has gone from its inputs"):
        again(plan.plan_id)


def test_a_model_that_is_gone_is_an_error_of_the_recipe(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    shutil.rmtree(models.experts[0])
    assert main(["plan", plan.plan_id]) == 1


def test_a_plan_that_says_too_little_is_refused(models: Family, tmp_path: Path) -> None:
    plan, _ = made(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), PlanOptions("30%"))
    with Catalog(default_location()) as catalog:
        record = catalog.plan(plan.plan_id)
        assert record is not None
        catalog.keep_plan(_changed(record, outcome={}), catalog.plan_entries(plan.plan_id))
    with pytest.raises(CatalogError, match=r"kept by another version of mergefs .* plan .*recipe\.yml once more"):
        again(plan.plan_id)
    with Catalog(default_location()) as catalog:
        catalog.keep_plan(
            _changed(record, made_by={**record.made_by, "tokenizer": "x"}, plan_id="0" * 32),
            catalog.plan_entries(plan.plan_id),
        )
    with pytest.raises(PlanError, match="the merged tokenizer is another one now"):
        again("0" * 32)


def _changed(record: PlanRecord, **fields: object) -> PlanRecord:
    return PlanRecord(*({name: getattr(record, name) for name in record.__struct_fields__} | fields).values())  # type: ignore[arg-type]


# Ids on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(models: Family, tmp_path: Path) -> str:
    """The id of a plan whose recipe is gone."""
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    plan_id = made(recipe, PlanOptions("30%"))[0].plan_id
    recipe.unlink()
    return plan_id


def test_a_plan_is_mounted_by_the_beginning_of_its_id(kept: str, directory: Path, tmp_path: Path) -> None:
    with mounted_recipes(Path(kept[:8]), mountpoint=directory / "mnt", state=tmp_path / "state"):
        assert os.getxattr(directory / "mnt", "user.mergefs.plan_id").decode() == kept
        shown = {file.name: file.read_bytes() for file in (directory / "mnt").iterdir()}
    assert shown == again(kept)[1]


def test_several_plans_are_mounted_side_by_side(models: Family, directory: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    ids = [made(recipe, PlanOptions(budget))[0].plan_id for budget in ("20%", "60%")]
    recipe.unlink()
    beginnings = [Path(plan_id[:10]) for plan_id in ids]
    with mounted_recipes(*beginnings, mountpoint=directory / "mnt", state=tmp_path / "state"):
        assert sorted(entry.name for entry in (directory / "mnt").iterdir()) == sorted(map(str, beginnings))
        for beginning, plan_id in zip(beginnings, ids, strict=True):
            provenance = json.loads((directory / "mnt" / beginning / "mergefs.json").read_text())
            assert provenance["plan_id"] == plan_id[:16]


def test_a_plan_is_written_explained_compared_and_opened_by_its_id(
    kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["materialize", kept, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan_id"] == kept
    assert main(["explain", kept[:6], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == kept
    assert main(["diff", kept, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert main(["plan", kept[:10], "--sweep", "10%,30%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][1]["plan_id"] == kept
    with open_model(kept) as model:
        assert model.plan.plan_id == kept
        assert torch.equal(model.get_tensor("lm_head.weight"), load_file(out / "model.safetensors")["lm_head.weight"])


def test_plans_are_listed_with_what_they_cost(kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "ls", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["plan_id"] == kept
    assert listed["recipe"].endswith("recipe.yml")
    assert main(["catalog", "ls"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if kept in line]
    assert f"({listed['expert_bytes_planned'] / listed['expert_bytes_total']:.0%})" in line
    assert f"{listed['predicted_relative_error']:.4f}" in line


def test_an_empty_catalog_has_no_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "ls"]) == 0
    assert capsys.readouterr().out == "The catalog has no plans.\n"


def test_the_beginning_of_several_ids_is_refused(kept: str) -> None:
    with Catalog(default_location()) as catalog:
        record = catalog.plan(kept)
        assert record is not None
        twin = kept[:12] + "0" * 20
        catalog.keep_plan(_changed(record, plan_id=twin), [])
        assert find_record(kept, catalog).plan_id == kept
        assert find_record(kept[:20], catalog).plan_id == kept
        with pytest.raises(PlanError, match=rf"{kept[:8]}: 2 plans have ids that begin so .*; give more digits"):
            find_record(kept[:8], catalog)


@given(st.data())
def test_a_beginning_means_the_one_plan_that_knows_what_its_inputs_hold_before_all_that_ask_the_same(
    data: st.DataObject,
) -> None:
    half = data.draw(st.text("0123456789abcdef", min_size=16, max_size=16))
    ends = data.draw(st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), min_size=2, unique=True))
    local, lasting = [f"local-{half}{end}" for end in ends[1:]], half + ends[0]
    beginning = half[: data.draw(st.integers(6, 16))]
    assert meant_by(beginning, [*local, lasting]) == [lasting]
    assert meant_by(f"local-{beginning}", [*local, lasting]) == local
    assert meant_by(local[0], [*local, lasting]) == [local[0]]
    assert meant_by(beginning, local) == local
    assert len(meant_by(half, [lasting, half + ends[1], *local])) == 2 + len(local)
    other = ("1" if half[15] == "0" else "0").join((half[:15], ends[0]))
    assert meant_by(half[:15], [lasting, f"local-{other}"]) == [lasting, f"local-{other}"]


@pytest.mark.parametrize("target", ["0123456789", "local-0123456", "f" * 32])
def test_an_id_that_no_plan_has_is_told_as_such(capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["plan", target]) == 1
    assert "no plan in" in (said := capsys.readouterr().err)
    assert "`mergefs catalog ls` lists the plans" in said


@pytest.mark.parametrize("target", ["abcde", "recipe", "f" * 33, "ABCDEF0123"])
def test_what_is_no_id_is_a_recipe_that_is_missing(capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["plan", target]) == 1
    assert f"{target}: there is no such recipe" in capsys.readouterr().err


def test_a_plan_has_its_own_options(kept: str) -> None:
    with pytest.raises(UsageError, match="has its budget and its other options already"):
        open_model(kept, budget="50%")
    assert main(["diff", kept, kept, "--budget", "10%"]) == 2


def test_a_file_that_is_called_like_a_plan_is_the_file(
    kept: str, models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path / kept, MERGES["task_arithmetic"], models)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", kept, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "task_arithmetic"
    assert any("is the file of that name here, and not the plan" in note for note in found["notes"])


def test_a_plan_is_kept_where_its_models_were_seen_last(models: Family, tmp_path: Path) -> None:
    """Planned anew after its models were moved, a plan is found at their new place."""
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    plan, files = made(recipe, PlanOptions("30%"))
    moved = Family(tmp_path / "moved" / "base", tuple(tmp_path / "moved" / e.name for e in models.experts))
    shutil.move(models.base.parent, tmp_path / "moved")
    text = recipe.read_text().replace(str(models.base.parent), str(tmp_path / "moved"))
    recipe.write_text(text)
    assert moved.base.is_dir()
    assert made(recipe, PlanOptions("30%"))[0].plan_id == plan.plan_id
    recipe.unlink()
    other, same_files = again(plan.plan_id)
    assert other.plan_id == plan.plan_id
    assert {n: d for n, d in same_files.items() if n.endswith(".safetensors")} == {
        n: d for n, d in files.items() if n.endswith(".safetensors")
    }
    assert replace(other.outcome) == plan.outcome
