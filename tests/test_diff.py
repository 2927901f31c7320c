"""``mergefs diff``: distances as the formula gives them, and nothing read that is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from hypothesis import given
from hypothesis import strategies as st
from mounting import mounted_recipes
from recipes import MERGES, write_recipe
from safetensors.torch import load_file, save_file

from mergefs.api import open_model
from mergefs.catalog import Catalog, default_location
from mergefs.checkpoint.dtypes import DTYPES
from mergefs.cli import main
from mergefs.comparison.compare import Comparison, compare
from mergefs.comparison.distance import squares
from mergefs.comparison.sides import Side, directory_side, plan_side
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe

BF16 = torch.bfloat16


def reference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return ||a-b|| / ||b|| of every tensor that both have, in float64."""
    shared = a.keys() & b.keys()
    return {name: float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in shared}


def overall(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return ||A-B|| / ||B|| over the tensors that differ."""
    differing = [name for name in a.keys() & b.keys() if not torch.equal(a[name].double(), b[name].double())]
    distance = sum(float((a[name].double() - b[name].double()).square().sum()) for name in differing)
    return math.sqrt(distance / sum(float(b[name].double().square().sum()) for name in differing))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def merged(recipe: Path, budget: str | None = None) -> dict[str, torch.Tensor]:
    with open_model(recipe, budget=budget) as model:
        return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (a safetensors interface)


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a model directory with nothing but these tensors."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    assert main(["diff", "--json", *map(str, arguments)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def compared(first: Path, second: Path) -> tuple[Comparison, int]:
    """Compare two directories; return the result, and how many bytes were read for it."""
    workspace = Workspace.create(Catalog(default_location()))
    try:
        result = compare(*(directory_side(path, workspace.catalog) for path in (first, second)), workspace.reader)
        return result, workspace.ledger.totals().expert_bytes_read
    finally:
        workspace.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=BF16, tied=False, shards=2)


# What is shown --------------------------------------------------------------------------------------------------------


def test_two_directories_are_as_far_apart_as_the_formula_says(
    models: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, base = models.experts[0], models.base
    found = json_of(capsys, expert, base)
    expected = reference(tensors_of(expert), tensors_of(base))
    shown = {tensor["name"]: tensor["relative_distance"] for tensor in found["tensors"]}  # type: ignore[attr-defined]
    assert shown == pytest.approx(expected, rel=1e-12)
    assert found["relative_distance"] == pytest.approx(overall(tensors_of(expert), tensors_of(base)), rel=1e-12)
    distances = list(shown.values())
    assert distances == sorted(distances, reverse=True)
    assert (found["same"], found["only_a"], found["only_b"], found["mismatches"]) == (False, [], [], [])


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_a_budget_is_held_against_the_whole_merge_without_anything_being_written(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], models)
    found = json_of(capsys, recipe, recipe, "--budget", "40%")
    part, whole = merged(recipe, "40%"), merged(recipe)
    shown = {tensor["name"]: tensor["relative_distance"] for tensor in found["tensors"]}  # type: ignore[attr-defined]
    assert shown == pytest.approx(reference(part, whole), rel=1e-12)
    assert found["relative_distance"] == pytest.approx(overall(part, whole), rel=1e-12)
    assert found["relative_distance"] != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


def test_a_mount_is_compared_like_any_directory(
    models: Family, tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    with mounted_recipes(recipe, mountpoint=directory / "mnt", state=tmp_path / "state"):
        assert json_of(capsys, directory / "mnt", recipe)["same"] is True
        against_base = json_of(capsys, directory / "mnt", models.base)
    expected = overall(merged(recipe), tensors_of(models.base))
    assert against_base["relative_distance"] == pytest.approx(expected, rel=1e-12)


def test_people_see_the_most_distant_tensors_and_are_told_of_the_rest(
    models: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(models.experts[0]), str(models.base), "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    expected = reference(tensors_of(models.experts[0]), tensors_of(models.base))
    largest = sorted((name for name in expected if expected[name]), key=lambda name: -expected[name])
    assert [name for name in expected if name in shown] == [name for name in expected if name in largest[:3]]
    assert f"and {len(largest) - 3} more that differ; --limit {len(largest)} shows them all" in shown
    assert f"{len(expected) - len(largest)} of {len(expected)} tensors are equal" in shown
    assert f"= ||A-B|| / ||B|| over the {len(largest)} tensors that differ" in shown


def test_tensors_that_have_no_distance_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = torch.arange(6.0)
    a = write_tensors(
        tmp_path / "a", {"same": same, "cut": torch.ones(2, 3), "mine": same + 1, "wide": same.float() + 1}
    )
    b = write_tensors(tmp_path / "b", {"same": same, "cut": torch.ones(3, 2), "wide": same.double()})
    found = json_of(capsys, a, b)
    assert (found["only_a"], found["only_b"]) == (["mine"], [])
    assert found["mismatches"] == [
        {"name": "cut", "shape_a": [2, 3], "shape_b": [3, 2], "dtype_a": "F32", "dtype_b": "F32"}
    ]
    wide = next(entry for entry in found["tensors"] if entry["name"] == "wide")  # type: ignore[attr-defined]
    assert (wide["dtype_a"], wide["dtype_b"]) == ("F32", "F64")
    assert wide["relative_distance"] == pytest.approx(math.sqrt(6 / 55))
    assert main(["diff", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "not compared: cut is [2, 3] F32 in A and [3, 2] F32 in B" in shown
    assert "only in A: mine" in shown
    assert "F32 in A, F64 in B" in shown


def test_numbers_that_json_does_not_have_are_null_and_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = torch.ones(4)
    a = {"nan": torch.tensor([1.0, math.nan]), "from nothing": one, "near": one * 1.5}
    b = {"nan": torch.tensor([1.0, 2.0]), "from nothing": one * 0, "near": one}
    found = json_of(capsys, write_tensors(tmp_path / "a", a), write_tensors(tmp_path / "b", b))
    rows = [(entry["name"], entry["relative_distance"]) for entry in found["tensors"]]  # type: ignore[attr-defined]
    assert rows == [("from nothing", None), ("nan", None), ("near", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.yml", "BASE"], "missing.yml"),
        (["BASE", "BASE", "--budget", "10%"], "--budget is for recipes"),
        (["BASE", "BASE", "--limit", "0"], "--limit"),
        (["EMPTY", "BASE"], "holds no weights"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    named = {"BASE": str(models.base), "EMPTY": str(tmp_path / "empty")}
    assert main(["diff", *(named.get(argument, argument) for argument in arguments)]) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err


# What is not read -----------------------------------------------------------------------------------------------------


def test_a_model_is_equal_to_itself_and_is_not_read(models: Family) -> None:
    result, read = compared(models.base, models.base)
    assert result.same
    assert result.relative == 0
    assert read == 0
    assert not any(tensor.read for tensor in result.tensors)


def test_tensors_whose_contents_are_known_to_be_equal_are_not_read(
    models: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = models.experts[0]
    before, all_bytes = compared(expert, models.base)
    assert main(["analyze", str(expert), str(models.base)]) == 0
    capsys.readouterr()
    after, read = compared(expert, models.base)
    differing = {tensor.name for tensor in after.differing}
    tensors = tensors_of(expert)
    assert all_bytes == 2 * sum(tensor.nbytes for tensor in tensors.values())
    assert read == 2 * sum(tensors[name].nbytes for name in differing) < all_bytes
    assert {tensor.name for tensor in after.tensors if not tensor.read} == tensors.keys() - differing
    # What was known of equal tensors changes no figure.
    assert after.relative == before.relative
    assert [(t.name, t.relative) for t in after.tensors] == [(t.name, t.relative) for t in before.tensors]


def test_entries_that_two_plans_share_are_not_read(models: Family, tmp_path: Path) -> None:
    """Two recipes that differ in the parameters of the attention alone."""
    document = json.loads(write_recipe(tmp_path / "a.yml", MERGES["task_arithmetic"], models).read_text())
    document["models"][0]["parameters"]["weight"] = [{"filter": "self_attn", "value": 0.1}, {"value": 0.6}]
    (tmp_path / "b.yml").write_text(json.dumps(document))
    workspace = Workspace.create(Catalog(default_location()))
    try:
        sides: list[Side] = []
        for name in ("a.yml", "b.yml"):
            plan = make_plan(load_recipe(tmp_path / name), PlanOptions(), workspace)
            sides.append(plan_side(plan, workspace))
        result = compare(sides[0], sides[1], workspace.reader)
    finally:
        workspace.close()
    assert {tensor.name for tensor in result.tensors if tensor.read} == {
        tensor.name for tensor in result.tensors if "self_attn" in tensor.name
    }
    assert result.differing


def test_a_plan_that_reads_nothing_of_its_experts_is_its_base(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    found = json_of(capsys, recipe, models.base, "--budget", "0")
    assert (found["same"], found["tensors_read"]) == (True, 0)


# The sums -------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=50),
    st.sampled_from(["F32", "F64", "F16", "BF16", "I32", "U8", "BOOL"]),
    st.sampled_from(["F32", "F64", "F16", "BF16", "I64"]),
)
def test_sums_of_squares_are_those_of_torch_for_all_dtypes(
    pairs: list[tuple[float, float]], first: str, second: str
) -> None:
    kinds = [getattr(torch, DTYPES[name].torch_name) for name in (first, second)]
    values = torch.tensor(pairs, dtype=torch.float64)
    small = values / 1e6 if "F16" in (first, second) else values
    a, b = (small[:, column].clamp(min=0).to(kind) for column, kind in enumerate(kinds))
    raws = [np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), np.uint8) for tensor in (a, b)]
    found = squares(raws[0], DTYPES[first], raws[1], DTYPES[second])
    assert found.difference == pytest.approx(float((a.double() - b.double()).square().sum()), rel=1e-12)
    assert found.norm == pytest.approx(float(b.double().square().sum()), rel=1e-12)
