"""``mergefs plan --sweep``: the plans that each budget would have, none of them kept, as a table and as a picture."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from checkpoints import Family, family
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog, default_location
from mergefs.cli import main
from mergefs.engine.workspace import Workspace
from mergefs.errors import BudgetError
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.sweep import parse_sweep, sweep
from mergefs.recipe.model import load_recipe

BUDGETS = ("0", "10%", "25%", "60%", "100%")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)


def points_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["plan", *arguments, "--sweep", ",".join(BUDGETS), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["points"]
    assert isinstance(found, list)
    return found


def test_each_point_is_the_plan_of_its_budget(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for point in points_of(capsys, str(recipe)):
        assert main(["plan", str(recipe), "--budget", str(point["budget"]), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert point["plan_id"] == plan["plan_id"]
        assert point["planned"] == plan["expert_bytes_planned"]
        assert point["error"] == plan["predicted_relative_error"]
        bound = point["bound"]
        assert bound == (0.0 if plan["error_bound"] == 0 else plan["error_bound_relative"])


def test_a_larger_budget_buys_more_and_leaves_less(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = points_of(capsys, str(recipe))
    assert [point["budget"] for point in points] == list(BUDGETS)
    planned = [int(str(point["planned"])) for point in points]
    errors = [float(str(point["error"])) for point in points]
    assert planned == sorted(planned)
    assert errors == sorted(errors, reverse=True)
    assert (planned[0], errors[0], errors[-1]) == (0, pytest.approx(1.0), 0.0)
    assert 0.9 < float(str(points[-1]["share"])) < 1.0  # frozen tensors are not read at full budget either


def test_a_sweep_keeps_no_plan_and_reads_the_models_once(models: Family, tmp_path: Path) -> None:
    """But for methods that are not linear, of which some blocks are merged to measure each selection."""
    recipe = write_recipe(tmp_path / "linear.yml", MERGES["task_arithmetic"], models)
    workspace = Workspace.create(Catalog(default_location()))
    try:
        plans = sweep(load_recipe(recipe), PlanOptions(), BUDGETS, workspace)
        first = next(plans)
        analysed = workspace.ledger.totals().analysis_bytes_read
        rest = list(plans)
        assert analysed > 0
        assert workspace.ledger.totals().analysis_bytes_read == analysed
        assert workspace.catalog.plans() == []
        again = make_plan(load_recipe(recipe), PlanOptions("60%"), workspace)
        assert again.plan_id == rest[2].plan_id != first.plan_id
        assert workspace.ledger.totals().analysis_bytes_read == analysed
    finally:
        workspace.close()


def test_a_sweep_of_everything_alone_needs_no_analysis(recipe: Path) -> None:
    workspace = Workspace.create(Catalog(default_location()))
    try:
        (plan,) = sweep(load_recipe(recipe), PlanOptions(), ["100%"], workspace)
        assert plan.outcome.budget_bytes is None
        assert workspace.ledger.totals().analysis_bytes_read == 0
    finally:
        workspace.close()


def test_people_get_a_table(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = points_of(capsys, str(recipe))
    assert main(["plan", str(recipe), "--sweep", " , ".join(BUDGETS)]) == 0
    shown = capsys.readouterr().out
    for point in points:
        (line,) = [line for line in shown.splitlines() if str(point["plan_id"]) in line]
        assert line.split()[0] == point["budget"]
        assert f"{float(str(point['error'])):.4f}" in line


def test_the_curve_is_drawn(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending, beginning in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        file = tmp_path / f"curve.{ending}"
        assert main(["plan", str(recipe), "--sweep", "5%,50%", "--plot", str(file)]) == 0
        assert f"drew {file}" in capsys.readouterr().out
        assert file.read_bytes().startswith(beginning)
    drawing = ElementTree.parse(tmp_path / "curve.svg").getroot()
    markers = [e for e in drawing.iter("{http://www.w3.org/2000/svg}use") if "#1f6bb8" in e.get("style", "")]
    assert len(markers) == 2


def test_without_matplotlib_the_way_to_have_it_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["plan", str(recipe), "--sweep", "5%", "--plot", str(tmp_path / "curve.png")]) == 1
    assert "pip install 'mergefs[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--sweep", "5%,,10%"], 1, "has an empty entry"),
        (["--sweep", "5%,120%"], 1, "'120%' is not between"),
        (["--sweep", "some"], 1, "'some' is neither a share nor a size"),
        (["--sweep", "5%", "--budget", "5%"], 2, "--budget and --sweep both say"),
        (["--plot", "curve.png"], 2, "--plot draws the curve of a sweep"),
        (["--sweep", "5%", "--plot", "curve.jpeg"], 2, "curve.jpeg does not say what to draw"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, sentence: str
) -> None:
    assert main(["plan", str(recipe), *arguments]) == status
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert sentence in shown.err


def test_budgets_of_a_list_are_read_in_its_order() -> None:
    assert parse_sweep("50%, 8GiB,1%") == ("50%", "8GiB", "1%")
    with pytest.raises(BudgetError):
        parse_sweep("")
