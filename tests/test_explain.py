"""``mergefs explain``: where the bytes go, against what the models themselves say, in terminal, page and JSON."""

import io
import json
import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from checkpoints import Family, family
from hypothesis import given
from hypothesis import strategies as st
from mounting import mounted_recipes
from pages import Page
from recipes import MERGES, write_recipe
from rich.console import Console
from safetensors.torch import load_file

from mergefs.api import open_model
from mergefs.catalog import Catalog, default_location
from mergefs.cli import main
from mergefs.engine.readings import last_reading
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.levels import EQUAL as EQUAL_LEVEL
from mergefs.planner.levels import WHOLE
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe
from mergefs.reports import page, terminal
from mergefs.reports.colours import BOUGHT_DARK, BOUGHT_LIGHT, ERROR_DARK, ERROR_LIGHT, STEPS, Scale, step
from mergefs.reports.explanation import Explanation, explain
from mergefs.reports.heatmap import NO_LAYER, Position, panels, position, short_ends
from mergefs.reports.spending import Amount, Spending
from mergefs.reports.wording import EQUAL, percent
from mergefs.sources.ledger import Purpose

BUDGET = "40%"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Example:
    """A recipe within a budget, explained."""

    recipe: Path
    family: Family
    plan: MergePlan
    explanation: Explanation


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("m"), experts=2, dtype=torch.bfloat16, tied=False, shards=2, layers=3)


@pytest.fixture(scope="module")
def example(models: Family, tmp_path_factory: pytest.TempPathFactory) -> Example:
    directory = tmp_path_factory.mktemp("example")
    recipe = write_recipe(directory / "recipe.yml", MERGES["task_arithmetic"], models)
    with Catalog(directory / "catalog") as catalog:
        workspace = Workspace.create(catalog)
        plan = make_plan(load_recipe(recipe), PlanOptions(budget=BUDGET), workspace)
        return Example(recipe, models, plan, explain(plan, workspace))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def printed(explanation: Explanation, *, colours: bool = False, width: int = 80) -> str:
    output = io.StringIO()
    system = "truecolor" if colours else None
    console = Console(file=output, width=width, force_terminal=colours, color_system=system, highlight=False)
    for part in terminal.render(explanation, width=width):
        console.print(part)
    return output.getvalue()


# What is told ---------------------------------------------------------------------------------------------------------


def test_bytes_and_errors_are_those_of_the_blocks_that_are_bought(example: Example) -> None:
    base = tensors_of(example.family.base)
    for report, directory in zip(example.explanation.experts, example.family.experts, strict=True):
        own = tensors_of(directory)
        for entry in report.spendings:
            planned = example.plan.tensors[entry.tensor]
            assert planned.selection is not None
            index = example.explanation.experts.index(report)
            delta = (own[entry.tensor].double() - base[entry.tensor].double()).view(-1)
            bought = left = free = 0.0
            for block, (start, stop) in enumerate(planned.grid):
                size = 2 * (stop - start)
                if not delta[start:stop].any():
                    free += size
                elif planned.selection.read[index, block]:
                    bought += size
                else:
                    left += float(delta[start:stop].square().sum())
            assert (entry.amount.total, entry.amount.planned, entry.amount.free) == (2 * delta.numel(), bought, free)
            expected = math.sqrt(left) / float(delta.norm()) if left else 0.0
            assert entry.amount.error == pytest.approx(expected, rel=1e-4)
    outcome = example.plan.outcome
    amount = example.explanation.amount
    assert (amount.total, amount.planned) == (outcome.expert_bytes_total, outcome.expert_bytes_planned)
    assert 0 < amount.planned < amount.total
    assert amount.free > 0


def test_of_planes_that_are_bought_the_error_is_what_they_leave(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    assert main(["analyze", str(recipe), "--planes", "2"]) == 0
    workspace = Workspace.create(Catalog(default_location()))
    try:
        plan = make_plan(load_recipe(recipe), PlanOptions(budget="12%"), workspace)
        explanation = explain(plan, workspace)
        base = tensors_of(models.base)
        seen = 0
        for index, (report, directory) in enumerate(zip(explanation.experts, models.experts, strict=True)):
            own = tensors_of(directory)
            for entry in report.spendings:
                tensor = plan.tensors[entry.tensor]
                selection = tensor.selection
                coded = tensor.coded[index] if tensor.coded else None
                if selection is None or coded is None:
                    continue
                kept = base[entry.tensor].clone().view(-1)
                for cell in range(selection.levels.shape[1]):
                    start, stop = selection.cells.bounds(cell)
                    level = int(selection.levels[index, cell])
                    raw = kept[start:stop].view(torch.uint8).numpy().copy()
                    if level == WHOLE:
                        kept[start:stop] = own[entry.tensor].view(-1)[start:stop]
                    elif 0 < level < EQUAL_LEVEL:
                        decoded = coded.decode(workspace.reader, raw, range(cell, cell + 1), level, Purpose.ANALYSIS)
                        kept[start:stop] = torch.from_numpy(decoded).view(torch.bfloat16)
                        seen += 1
                whole = own[entry.tensor].double().view(-1)
                expected = float((whole - kept.double()).norm() / (whole - base[entry.tensor].double().view(-1)).norm())
                assert entry.amount.error == pytest.approx(expected, rel=1e-3, abs=1e-6), entry.tensor
        assert seen
    finally:
        workspace.close()


def test_a_heat_map_has_every_tensor_at_its_layer_and_kind(example: Example) -> None:
    report = example.explanation.experts[0]
    layers, loose = report.panels()
    assert (layers.title, layers.rows) == ("model.layers", ("0", "1", "2"))
    assert set(layers.kinds) >= {"self_attn.q_proj", "mlp.down_proj", "input_layernorm"}
    assert (loose.title, loose.rows) == (NO_LAYER, ("",))
    by_name = {entry.tensor: entry.amount for entry in report.spendings}
    for row, cells in zip(layers.rows, layers.cells, strict=True):
        for kind, cell in zip(layers.kinds, cells, strict=True):
            assert cell == by_name[f"model.layers.{row}.{kind}.weight"]


def test_rows_of_several_layers_hold_the_sum_of_their_layers(example: Example) -> None:
    report = example.explanation.experts[0]
    fine, coarse = report.panels()[0], report.panels(2)[0]
    assert coarse.rows == ("0-1", "2")
    for column in range(len(fine.kinds)):
        first, second = fine.cells[0][column], fine.cells[1][column]
        assert first is not None
        assert second is not None
        assert coarse.cells[0][column] == first + second
        assert coarse.cells[1][column] == fine.cells[2][column]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Position("model.layers", 3, "self_attn.q_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Position("model.layers", 3, "self_attn.q_proj.bias")),
        ("model.layers.0.mlp.experts.12.w1.weight", Position("model.layers", 0, "mlp.experts.*.w1")),
        ("transformer.h.11.ln_1.weight", Position("transformer.h", 11, "ln_1")),
        ("lm_head.weight", Position(None, None, "lm_head")),
    ],
)
def test_a_tensor_stands_where_its_name_says(name: str, expected: Position) -> None:
    assert position(name) == expected


def test_a_stack_may_lack_tensors_that_other_layers_have() -> None:
    entries = [Spending(0, name, (1,), Amount(total=2)) for name in ("a.0.x.weight", "a.1.x.weight", "a.1.y.weight")]
    (panel,) = panels(entries)
    assert panel.cells == ((Amount(total=2), None), (Amount(total=2), Amount(total=2)))
    shown = printed(replace(explained_of(entries), notes=("a note",)))
    assert "a note" in shown


def explained_of(entries: list[Spending]) -> Explanation:
    """Return an explanation of one expert, made of ``entries``."""
    from mergefs.reports.explanation import ExpertReport

    amount = sum((entry.amount for entry in entries), Amount())
    return Explanation({"recipe": "r.yml"}, (ExpertReport("e", "e", amount, tuple(entries)),), None, ())


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_short_names_are_the_names_ends_and_tell_them_apart(names: list[str]) -> None:
    short = short_ends(names, ".")
    assert len(set(short)) == len(names)
    for name, label in zip(names, short, strict=True):
        assert name == label or name.endswith(f".{label}")


@given(st.floats(0, 1))
def test_only_all_and_nothing_are_shown_as_such(share: float) -> None:
    shown = percent(share)
    assert (shown == "0") == (share == 0)
    assert (shown == "100") == (share == 1)
    assert (step(share) == 0) == (share == 0)
    assert (step(share) == STEPS - 1) == (share == 1)


@pytest.mark.parametrize("scale", [BOUGHT_LIGHT, BOUGHT_DARK, ERROR_LIGHT, ERROR_DARK])
def test_numbers_can_be_read_on_their_colours(scale: Scale) -> None:
    def luminance(colour: str) -> float:
        values = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        light = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]

    for number in range(STEPS):
        pair = sorted((luminance(scale.colour(number)), luminance(scale.ink(number))))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5  # what WCAG asks of text


# The terminal ---------------------------------------------------------------------------------------------------------


def test_80_columns_hold_it_and_it_needs_no_colours(example: Example) -> None:
    shown = printed(example.explanation)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert ANSI.sub("", printed(example.explanation, colours=True)) == shown
    for report in example.explanation.experts:
        assert f"{report.label}: bytes bought, %" in shown
        assert f"{report.label}: error left, % of the expert's delta" in shown
    assert example.plan.plan_id in shown


def test_every_cell_is_a_number_on_the_colour_of_its_share(example: Example) -> None:
    shown = printed(example.explanation, colours=True)
    bought, _, error = shown.partition("error left, % of the expert's delta")
    layer = next(line for line in ANSI.sub("", bought).splitlines() if re.match(r"\s*0 ", line))
    panel = example.explanation.experts[0].panels()[0]
    expected = [
        EQUAL if cell.free == cell.total else percent(cell.planned / cell.total)
        for cell in panel.cells[0]
        if cell is not None
    ]
    assert layer.split()[1:] == expected
    whole = ";".join(str(int(BOUGHT_LIGHT.colour(STEPS - 1)[index : index + 2], 16)) for index in (1, 3, 5))
    nothing = ";".join(str(int(ERROR_LIGHT.colour(0)[index : index + 2], 16)) for index in (1, 3, 5))
    assert re.search(rf"48;2;{whole}m +100 +\x1b", bought)
    assert re.search(rf"48;2;{nothing}m +0 +\x1b", error)


def test_many_kinds_are_shown_in_several_tables() -> None:
    entries = [Spending(0, f"m.0.kind_{number}.weight", (1,), Amount(2, 0, 0, None, 1, 1)) for number in range(30)]
    shown = printed(explained_of(entries))
    assert max(map(len, shown.splitlines())) <= 80
    assert len(re.findall(r"^\s*m\b|^\s*0 ", shown, re.MULTILINE)) >= 6


def test_a_plan_that_reads_everything_has_no_map_in_the_terminal(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    assert main(["explain", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "expert-1: nothing is left out" in shown
    assert "bytes bought, %" not in shown


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_by_itself_and_shows_every_cell_without_javascript(example: Example) -> None:
    found = Page(page.render(example.explanation))
    assert found.loaded() == []
    policy = next(e for e in found.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert (policy.attributes["content"] or "").startswith("default-src 'none'")
    cells = [e for e in found.all("td") if "figure" in e.parents]
    tensors = sum(len(report.spendings) for report in example.explanation.experts)
    assert len(cells) == 2 * tensors  # one map of what is bought, and one of what is left
    told = {e.attributes["title"]: e.text for e in cells}
    entry = next(e for e in example.explanation.experts[0].spendings if e.tensor.endswith("0.mlp.down_proj.weight"))
    line = next(text for text in told if text and text.startswith("model.layers.0.mlp.down_proj:"))
    assert f"{entry.amount.error:.4f} of the delta" in line
    for element in cells:
        assert element.text in (EQUAL, "?", "<1") or element.text.isdigit()
    assert len(found.all("table", "map")) == 8
    (script,) = found.all("script")
    assert "http" not in script.text


def test_the_page_has_the_same_numbers_as_the_plan(example: Example) -> None:
    found = Page(page.render(example.explanation))
    facts = dict(zip((e.text for e in found.all("dt")), (e.text for e in found.all("dd")), strict=True))
    assert facts == example.explanation.facts
    rows = found.all("table", "sortable")[-1]
    assert rows.text.count("model.layers.0.mlp.down_proj.weight") == 2


def test_names_of_others_are_text_on_the_page_and_nothing_else(example: Example) -> None:
    report = example.explanation.experts[0]
    evil = '"><script src="http://example.org/x.js"></script><td title="'
    entries = tuple(replace(entry, tensor=f"{evil}.{entry.tensor}") for entry in report.spendings)
    explanation = replace(
        example.explanation,
        facts={**example.explanation.facts, "recipe": evil},
        experts=(replace(report, reference=evil, label=evil, spendings=entries),),
        notes=(evil,),
    )
    found = Page(page.render(explanation))
    assert found.loaded() == []
    assert len(found.all("script")) == 1
    assert evil in (found.all("h2")[1].text, found.all("h1")[0].text)


def test_the_page_is_written_where_it_was_asked_for(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.html"
    target.write_text("what was there")
    assert main(["explain", str(example.recipe), "--budget", BUDGET, "--html", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert Page(target.read_text()).all("table", "map")
    assert main(["explain", str(example.recipe), "--html", str(tmp_path / "absent" / "page.html")]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
    assert main(["explain", str(example.recipe), "--html", str(tmp_path)]) == 1
    assert "is a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(example: Example, tmp_path: Path, scheme: int, width: int) -> None:
    """Headless Chromium: no scrolling sideways, colours of the scheme, tables that can be sorted, a tip on a cell."""
    probe = """<script>
      const cell = document.querySelector(".map td[title]");
      const title = cell.title;
      cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      const table = [...document.querySelectorAll("table.sortable")].at(-1);
      table.querySelectorAll("button")[2].click();
      const sizes = [...table.tBodies[0].rows].map(row => Number(row.cells[2].querySelector("data").value));
      document.body.dataset.found = JSON.stringify({
        wide: document.documentElement.scrollWidth - innerWidth,
        tip: document.getElementById("tip").textContent === title && !document.getElementById("tip").hidden,
        sorted: sizes.every((size, index) => index === 0 || sizes[index - 1] >= size),
        page: getComputedStyle(document.documentElement).backgroundColor,
        whole: getComputedStyle(document.querySelector(".b10")).backgroundColor,
      });
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(page.render(example.explanation).replace("</body>", probe + "</body>"))
    dumped = in_browser("--dump-dom", file=file, width=width, scheme=scheme)
    found = json.loads(next(e for e in Page(dumped).all("body")).attributes["data-found"] or "")
    colours = (BOUGHT_DARK, BOUGHT_LIGHT)[scheme].colour(STEPS - 1)
    whole = ", ".join(str(int(colours[index : index + 2], 16)) for index in (1, 3, 5))
    assert found == {
        "wide": 0,
        "tip": True,
        "sorted": True,
        "page": ("rgb(20, 23, 27)", "rgb(255, 255, 255)")[scheme],
        "whole": f"rgb({whole})",
    }
    picture = tmp_path / "page.png"
    in_browser(f"--screenshot={picture}", file=file, width=width, scheme=scheme)
    assert picture.read_bytes().startswith(b"\x89PNG")


def in_browser(action: str, *, file: Path, width: int, scheme: int) -> str:
    """Open ``file`` in headless Chromium and return what it prints."""
    browser = shutil.which("chromium")
    assert browser is not None, "there is no chromium; scripts/test.sh --all installs it"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={file.parent / 'profile'}"]
    done = subprocess.run(
        [browser, *options, action, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


# JSON -----------------------------------------------------------------------------------------------------------------


def test_programs_get_the_same_numbers(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(example.recipe), "--budget", BUDGET, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == example.plan.plan_id
    for shown, report in zip(found["experts"], example.explanation.experts, strict=True):
        assert shown["bytes_planned"] == report.amount.planned
        assert [tensor["relative_error_left"] for tensor in shown["tensors"]] == [
            entry.amount.error for entry in report.spendings
        ]
    assert found["reading"] is None


# Planned and really read ----------------------------------------------------------------------------------------------


@pytest.fixture
def explained(models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator["Explained"]:
    yield Explained(write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models), capsys)


@dataclass(frozen=True, slots=True)
class Explained:
    """A recipe within the budget, and what ``explain`` says of it after each reading."""

    recipe: Path
    capsys: pytest.CaptureFixture[str]

    def json(self) -> dict[str, object]:
        self.capsys.readouterr()
        assert main(["explain", str(self.recipe), "--budget", BUDGET, "--json"]) == 0
        found = json.loads(self.capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    def counts(self) -> list[tuple[str, int, int]]:
        """Return for each tensor of each expert what was planned and what was read."""
        return [
            (tensor["name"], tensor["bytes_planned"], tensor["bytes_read"])
            for expert in self.json()["experts"]  # type: ignore[attr-defined]
            for tensor in expert["tensors"]
        ]


def test_a_whole_reading_is_what_was_planned_tensor_by_tensor(explained: Explained, tmp_path: Path) -> None:
    assert main(["materialize", str(explained.recipe), str(tmp_path / "out"), "--budget", BUDGET]) == 0
    assert explained.json()["reading"]["how"] == "materialize"  # type: ignore[index]
    counts = explained.counts()
    assert sum(read for *_, read in counts) > 0
    for name, planned, read in counts:
        assert read == planned, name


def test_a_reading_of_one_tensor_is_what_it_cost(explained: Explained) -> None:
    with open_model(explained.recipe, budget=BUDGET) as model:
        name = next(name for name, tensor in model.plan.tensors.items() if tensor.planned_expert_bytes)
        model.get_tensor(name)
        spent = model.bytes_read["expert_bytes_read"]
    counts = explained.counts()
    assert sum(read for tensor, _, read in counts if tensor == name) == spent
    assert sum(read for tensor, _, read in counts if tensor != name) == 0


def test_a_mount_keeps_what_was_read_of_it(explained: Explained, directory: Path, tmp_path: Path) -> None:
    with mounted_recipes(
        explained.recipe, mountpoint=directory / "mnt", state=tmp_path / "state", options=["--budget", BUDGET]
    ):
        for file in (directory / "mnt").glob("*.safetensors"):
            file.read_bytes()
    assert explained.json()["reading"]["how"] == "mount"  # type: ignore[index]
    for name, planned, read in explained.counts():
        assert read == planned, name


def test_bytes_that_are_read_again_count_apart(explained: Explained) -> None:
    with open_model(explained.recipe, budget=BUDGET, cache_size=1) as model:
        name = next(name for name, tensor in model.plan.tensors.items() if tensor.planned_expert_bytes)
        for _ in range(2):
            model.get_tensor(name)
        read = model.bytes_read
        plan_id = model.plan.plan_id
    with Catalog(default_location()) as catalog:
        reading = last_reading(plan_id, catalog)
    assert reading is not None
    assert sum(map(sum, reading.first().values())) == read["expert_bytes_read"] > 0
    assert reading.again == read["expert_bytes_reread"] == read["expert_bytes_read"]


def test_what_was_not_read_leaves_no_record(explained: Explained) -> None:
    with open_model(explained.recipe, budget=BUDGET):
        pass
    assert explained.json()["reading"] is None


def test_people_see_planned_and_read_side_by_side(explained: Explained, tmp_path: Path) -> None:
    assert main(["materialize", str(explained.recipe), str(tmp_path / "out"), "--budget", BUDGET]) == 0
    explained.capsys.readouterr()
    assert main(["explain", str(explained.recipe), "--budget", BUDGET]) == 0
    shown = explained.capsys.readouterr().out
    _, _, after = shown.partition("planned and really read, by materialize until ")
    rows = defaultdict(list)
    for line in after.splitlines():
        if line.rstrip().endswith("%"):
            rows[line.split()[-1]].append(line)
    assert set(rows) == {"100.0%"}
    assert max(map(len, shown.splitlines())) <= 80
