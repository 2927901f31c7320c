"""The study of budgets in docs/budget.md: its bound, its rules, and that the whole of it still runs, on tiny models."""

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import family
from hypothesis import given
from hypothesis import strategies as st
from mounting import ROOT, environment
from recipes import MERGES, write_recipe

sys.path.append(str(ROOT / "scripts"))

from budget_study.bound import Rows, least_squared_error
from budget_study.granularity import error_of_largest_rows
from budget_study.report import BEGIN, END, with_section
from budget_study.rules import coin_flip, largest_norm, spend_by

from mergefs.api import MergedModel
from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.errors import MergefsError
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources.place import Role

# The bound ------------------------------------------------------------------------------------------------------------


@given(variance=st.floats(1e-6, 1e6), bits=st.floats(0.1, 8.0))
def test_each_bit_for_each_of_equal_rows_quarters_the_squared_error(variance: float, bits: float) -> None:
    rows = Rows(np.array([30.0, 70.0]), np.array([variance, variance]))
    assert least_squared_error(rows, 100 * bits) == pytest.approx(100 * variance * 4.0**-bits, rel=1e-6)


def test_rows_below_the_water_level_get_no_bits() -> None:
    rows = Rows(np.array([10.0, 10.0]), np.array([16.0, 1.0]))
    assert least_squared_error(rows, 0.0) == pytest.approx(170.0)
    assert least_squared_error(rows, 10.0) == pytest.approx(10 * 4.0 + 10 * 1.0, rel=1e-6)
    # Another 10 bits bring the first row down to the second one's variance; from there both share.
    assert least_squared_error(rows, 20.0) == pytest.approx(20.0, rel=1e-6)
    assert least_squared_error(rows, 40.0) == pytest.approx(20.0 / 4.0, rel=1e-6)


def test_a_delta_of_zeros_has_nothing_to_lose() -> None:
    assert least_squared_error(Rows.of([{"a": np.zeros((3, 4), dtype=np.float32)}]), 8.0) == 0.0


def test_single_rows_are_bought_by_their_mean_square_and_errors_of_experts_add_up() -> None:
    first = {"a": np.array([[3.0, 3.0], [1.0, 1.0]], dtype=np.float32)}
    second = {"a": np.array([[-2.0, 0.0], [1.0, 1.0]], dtype=np.float32)}
    assert error_of_largest_rows([first, second], 0) == pytest.approx(math.sqrt(1 + 9 + 4 + 4))
    assert error_of_largest_rows([first, second], 4) == pytest.approx(math.sqrt(4 + 4 + 4))
    assert error_of_largest_rows([first, second], 16) == 0.0


# The rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "7%", "50%", "99%"])
def test_a_rule_spends_no_more_than_the_budget_and_what_it_plans_is_read(tmp_path: Path, budget: str) -> None:
    import torch

    made = family(tmp_path, experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = write_recipe(tmp_path / "ties.yml", MERGES["ties"], made)
    for rule in (coin_flip(0), largest_norm):
        workspace = Workspace.create(Catalog(tmp_path / "catalog"))
        try:
            plan = make_plan(load_recipe(recipe), PlanOptions(budget), workspace)
            before = workspace.ledger.totals().expert_bytes_read
            mine = spend_by(rule, plan, workspace.catalog)
            model = MergedModel(mine, workspace)
            for name in model.keys():  # noqa: SIM118 (a safetensors interface)
                model.get_tensor(name)
            assert plan.outcome.budget_bytes is not None
            assert mine.outcome.expert_bytes_planned <= plan.outcome.budget_bytes
            assert workspace.ledger.totals().expert_bytes_read - before == mine.outcome.expert_bytes_planned
            assert (mine.outcome.expert_bytes_planned > 0) == (budget != "0")
        finally:
            workspace.close()


def test_a_coin_flip_buys_a_block_of_all_experts_and_largest_norms_come_first(tmp_path: Path) -> None:
    import torch

    made = family(tmp_path, experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    recipe = write_recipe(tmp_path / "merge.yml", MERGES["task_arithmetic"], made)
    workspace = Workspace.create(Catalog(tmp_path / "catalog"))
    try:
        plan = make_plan(load_recipe(recipe), PlanOptions("50%"), workspace)
        flipped = spend_by(coin_flip(1), plan, workspace.catalog)
        for tensor in flipped.tensors.values():
            assert tensor.selection is not None
            experts = [role is Role.EXPERT for role in tensor.roles]
            bought, read = tensor.selection.bought[experts], tensor.selection.read[experts]
            assert (bought.all(axis=0) | ~read.any(axis=0)).all()
        again = spend_by(coin_flip(1), plan, workspace.catalog)
        other = spend_by(coin_flip(2), plan, workspace.catalog)
        levels = [
            b"".join(t.selection.levels.tobytes() for t in p.tensors.values() if t.selection is not None)
            for p in (flipped, again, other)
        ]
        assert levels[0] == levels[1] != levels[2]
    finally:
        workspace.close()


def test_the_norm_rule_takes_pieces_in_order_of_their_norm() -> None:
    from budget_study.rules import Piece

    pieces = [Piece("a", 0, (1,), 10, 2.0), Piece("a", 1, (1,), 99, 5.0), Piece("b", 0, (2,), 1, 3.0)]
    ordered = largest_norm(pieces)
    assert all(first.squared_norm >= second.squared_norm for first, second in pairwise(ordered))
    assert set(ordered) == set(pieces)


# The page -------------------------------------------------------------------------------------------------------------


def test_the_measured_part_of_a_page_is_replaced_and_the_rest_is_kept() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_section(page, "new") == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    with pytest.raises(MergefsError, match="has no lines"):
        with_section("nothing here", "new")


def test_the_committed_page_has_what_the_script_writes() -> None:
    page = (ROOT / "docs" / "budget.md").read_text(encoding="utf-8")
    measured = page[page.index(BEGIN) : page.index(END)]
    for method in ("task_arithmetic", "linear", "ties", "dare_ties"):
        assert measured.count(f"**`{method}`**") == 2, "each method is measured on two families"
    for figure in re.findall(r"\]\((figures/[^)]+)\)", page):
        assert (ROOT / "docs" / figure).read_bytes().startswith(b"\x89PNG")


def test_the_whole_study_runs_on_tiny_models_and_goes_on_where_it_was(tmp_path: Path) -> None:
    page = tmp_path / "budget.md"
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    command = [
        sys.executable,
        ROOT / "scripts" / "measure_budget.py",
        "--quick",
        "--document",
        page,
        tmp_path / "study",
    ]
    runs = []
    for _ in range(2):
        # Models this small are slowed down by threads.
        alone = environment(tmp_path, {"OMP_NUM_THREADS": "1"})
        result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=140, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        runs.append((page.read_text(encoding="utf-8"), result.stdout, result.stderr))
    (text, claims, said), (same, same_claims, nothing) = runs
    assert "error" in said
    assert (same, same_claims, nothing) == (text, claims, "")
    rows = re.findall(
        r"^\| (?:coin|largest|planner)[^|]*\| \**([\d.]+)\** / ([\d.]+) \| \**([\d.]+)", text, re.MULTILINE
    )
    assert len(rows) == 2 * 4
    for less, perplexity, more in rows:
        assert 0 <= float(more) <= float(less) <= 1.1
        assert 1 < float(perplexity) < 300
    for figure in ("budget.png", "budget-task-arithmetic.png"):
        assert (tmp_path / "figures" / figure).read_bytes().startswith(b"\x89PNG")
