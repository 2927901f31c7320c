"""What of a merged model is a plain copy: which bytes, what it costs to compute them, and where they lie in files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from hypothesis import given
from hypothesis import strategies as st
from recipes import MERGES, write_document, write_recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentences import said_by
from weight_pieces import MIB

from mergefs.catalog import Catalog
from mergefs.checkpoint.header import encode_header
from mergefs.engine import merging
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.kernels.precision import Raw
from mergefs.materialize import durability, weights
from mergefs.materialize import run as run_module
from mergefs.materialize.manifest import manifest_hash, read_manifest
from mergefs.materialize.sharing import file_copies
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.copies import copies
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe

PAGE = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of two files each, whose norms fill no page."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=2, hidden=192, layers=11, vocabulary=9000
    )


@pytest.fixture
def resources() -> Iterator[Workspace]:
    workspace = Workspace.create(Catalog(Path(os.environ["MERGEFS_CATALOG"])))
    yield workspace
    workspace.close()


def plan_of(recipe: Path, resources: Workspace, budget: str | None = None, base: Path | None = None) -> MergePlan:
    options = PlanOptions(budget=budget, base=None if base is None else str(base))
    return make_plan(load_recipe(recipe), options, resources, identified=True)


def passthrough(path: Path, model: Path, **others: object) -> Path:
    return write_document(path, {"merge_method": "passthrough", "models": [{"model": str(model), **others}]})


def copied_share(plan: MergePlan) -> float:
    copied = sum(copy.end - copy.begin for tensor in plan.tensors.values() for copy in copies(tensor))
    return copied / sum(tensor.nbytes for tensor in plan.tensors.values())


def check_copies(plan: MergePlan, resources: Workspace) -> None:
    """Every byte that is said to be a copy must be that of the source, as the engine computes it."""
    files = ModelFiles(plan, resources, strict=True)
    for file in plan.files:
        for copy in file_copies(file, plan.tensors):
            with copy.shard.path.open("rb") as source:
                source.seek(copy.begin + copy.shift)
                assert source.read(copy.end - copy.begin) == files.read(file.name, copy.begin, copy.end - copy.begin)


# Which bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("budget", ["0%", "30%", None])
def test_what_is_said_to_be_a_copy_is_one(
    name: str, budget: str | None, models: Family, resources: Workspace, tmp_path: Path
) -> None:
    merge = MERGES[name]
    base = None if merge.with_base else models.base
    plan = plan_of(write_recipe(tmp_path / "recipe.yml", merge, models), resources, budget, base)
    check_copies(plan, resources)
    if budget == "0%":
        assert copied_share(plan) == 1
    elif budget is None:
        assert copied_share(plan) == 0
    else:
        assert 0 < copied_share(plan) < 1


def test_a_model_that_is_passed_through_is_copied(models: Family, resources: Workspace, tmp_path: Path) -> None:
    plan = plan_of(passthrough(tmp_path / "recipe.yml", models.experts[0]), resources)
    check_copies(plan, resources)
    assert copied_share(plan) == 1


@pytest.mark.parametrize("budget", ["0%", "40%"])
def test_a_model_that_is_passed_through_in_part_is_copied_from_it_and_from_what_stands_in(
    budget: str, models: Family, resources: Workspace, tmp_path: Path
) -> None:
    plan = plan_of(passthrough(tmp_path / "recipe.yml", models.experts[0]), resources, budget, models.base)
    check_copies(plan, resources)
    assert copied_share(plan) == 1
    sources = {copy.source.shard.path.parent for tensor in plan.tensors.values() for copy in copies(tensor)}
    assert sources == ({models.base} if budget == "0%" else {models.base, models.experts[0]})


def test_what_is_scaled_or_converted_is_no_copy(models: Family, resources: Workspace, tmp_path: Path) -> None:
    scaled = passthrough(tmp_path / "scaled.yml", models.experts[0], parameters={"scale": 0.5})
    assert copied_share(plan_of(scaled, resources)) == 0
    merge = MERGES["task_arithmetic"]
    for number, dtypes in enumerate([("float32", None), ("bfloat16", "float32"), ("float32", "bfloat16")]):
        recipe = write_recipe(tmp_path / f"{number}.yml", merge, models, *dtypes)
        assert copied_share(plan_of(recipe, resources, "0%")) == 0


def test_no_kernel_is_run_for_a_copy(
    models: Family, resources: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a budget only the blocks that something is bought of are computed."""
    ran: list[int] = []
    real = merging.run_kernel

    def counted(*arguments: Any, **how: Any) -> Raw:
        ran.append(1)
        return real(*arguments, **how)

    monkeypatch.setattr(merging, "run_kernel", counted)
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    for plan in (
        plan_of(passthrough(tmp_path / "whole.yml", models.experts[0]), resources),
        plan_of(recipe, resources, "0%"),
        plan_of(recipe, resources, "30%"),
    ):
        ran.clear()
        files = ModelFiles(plan, resources, strict=True)
        for file in plan.files:
            files.read(file.name, 0, file.size)
        selections = [tensor.selection for tensor in plan.tensors.values() if tensor.selection is not None]
        assert len(ran) == sum(int(selection.computed.sum()) for selection in selections)


# Where they lie -------------------------------------------------------------------------------------------------------


@given(place=st.integers(0, PAGE // 8 - 1).map(lambda number: 8 * number), name=st.text(max_size=5000))
def test_data_begins_where_it_is_to_begin(place: int, name: str) -> None:
    header = encode_header([], {"name": name}, PAGE, place)
    assert len(header) % PAGE == place
    assert len(header) - len(header.rstrip(b" ")) < PAGE
    assert len(header) - len(encode_header([], {"name": name})) < PAGE


@pytest.mark.parametrize("kind", ["passthrough", "budget"])
def test_files_are_cut_and_aligned_as_those_that_they_are_copied_from(
    kind: str, models: Family, tmp_path: Path
) -> None:
    """So all pages of both can be shared, though norms fill none; the reference parser reads them."""
    recipe, options = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), ["--budget", "0%"]
    if kind == "passthrough":
        recipe, options = passthrough(tmp_path / "recipe.yml", models.base), []
    assert said_by("materialize", *options, recipe, tmp_path / "out").status == 0
    sources = sorted(models.base.glob("*.safetensors"))
    assert len(sources) > 1
    for source in sources:
        written = tmp_path / "out" / source.name
        data, copied = source.read_bytes(), written.read_bytes()
        begin, copied_begin = (8 + int.from_bytes(content[:8], "little") for content in (data, copied))
        assert begin % PAGE == copied_begin % PAGE != 0
        assert data[begin:] == copied[copied_begin:]
        with safe_open(written, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {source.name for source in sources}


def test_no_file_is_larger_than_allowed_though_those_that_it_is_copied_from_are(models: Family, tmp_path: Path) -> None:
    largest = 4_000_000
    recipe = passthrough(tmp_path / "recipe.yml", models.base)
    assert said_by("materialize", "--max-shard-size", str(largest), recipe, tmp_path / "out").status == 0
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > len(list(models.base.glob("*.safetensors")))
    assert max(sizes) <= largest + 2 * PAGE


def test_a_merge_that_copies_little_is_laid_out_by_names_alone(
    models: Family, resources: Workspace, tmp_path: Path
) -> None:
    plan = plan_of(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), resources)
    (file,) = plan.files
    assert len(file.header) % PAGE == 0
    assert list(file.tensors) == list(plan.tensors)


# Sources that are cut otherwise ---------------------------------------------------------------------------------------


def cut_anew(model: Path) -> None:
    """Put all tensors of a model into one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (model / "model.safetensors.index.json").unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def moved(models: Family, tmp_path: Path) -> Family:
    """The models at a place where they can be changed."""
    paths = [Path(shutil.copytree(path, tmp_path / "moved" / path.name)) for path in (models.base, *models.experts)]
    return Family(paths[0], tuple(paths[1:]))


def test_copies_of_the_models_give_the_same_files(models: Family, moved: Family, tmp_path: Path) -> None:
    said = []
    for number, family_ in enumerate((models, moved)):
        recipe = write_recipe(tmp_path / f"{number}.yml", MERGES["ties"], family_)
        assert said_by("materialize", "--budget", "20%", recipe, tmp_path / f"out-{number}").status == 0
        said.append({path.name: path.read_bytes() for path in (tmp_path / f"out-{number}").glob("*.safetensors")})
    assert said[0] == said[1]


def test_sources_that_are_cut_otherwise_give_the_same_plan_and_tensors_in_other_files(
    moved: Family, tmp_path: Path
) -> None:
    recipe, budget = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], moved), ("--budget", "20%")
    assert said_by("materialize", *budget, recipe, tmp_path / "before").status == 0
    cut_anew(moved.base)
    assert said_by("materialize", *budget, recipe, tmp_path / "after").status == 0
    before, after = read_manifest(tmp_path / "before"), read_manifest(tmp_path / "after")
    assert (before.plan_id, before.contents, before.content) == (after.plan_id, after.contents, after.content)
    assert {name: entry.content for name, entry in before.tensors.items()} == {
        name: entry.content for name, entry in after.tensors.items()
    }
    assert len(before.files) != len(after.files)


def test_a_model_whose_sources_are_cut_otherwise_now_is_still_what_they_give(moved: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], moved)
    assert said_by("materialize", "--budget", "20%", recipe, tmp_path / "out").status == 0
    cut_anew(moved.base)
    said = said_by("verify", "--deep", tmp_path / "out")
    assert said.status == 0, said.stderr
    assert "are what the sources give now" in said.stdout


def test_work_on_files_that_were_cut_otherwise_is_not_gone_on_with(
    moved: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pieces would lie at other places: all of it is written anew."""
    monkeypatch.setattr(weights, "CHUNK", MIB)
    monkeypatch.setattr(durability, "SYNC_BYTES", MIB)
    recipe, out = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], moved), tmp_path / "out"
    expected = moved.base.parent / "expected"
    for number, cut in enumerate([False, True]):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "check_sources", interrupt)
            assert said_by("materialize", "--budget", "20%", recipe, out).status != 0
        assert not out.exists()
        if cut:
            cut_anew(moved.base)
        said = said_by("materialize", "--json", "--budget", "20%", "--resume", recipe, out)
        assert said.status == 0, said.stderr
        reused = json.loads(said.stdout)["reused_bytes"]
        assert reused == 0 if cut else reused > 0
        assert said_by("materialize", "--budget", "20%", recipe, expected.with_name(str(number))).status == 0
        assert manifest_hash(out) == manifest_hash(expected.with_name(str(number)))
        shutil.rmtree(out)


def interrupt(files: ModelFiles) -> None:
    """Interrupt a run where it would look at its sources once more."""
    raise KeyboardInterrupt
