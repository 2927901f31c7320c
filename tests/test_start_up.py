"""What a command imports and does before its work begins: only what that work needs."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from examples import METHODS, Families, FamilyKind
from mounting import environment
from recipes import recipe_document, write_document

from mergefs.cli import main
from mergefs.cli.registry import COMMANDS

RUN: Final = """
import atexit, gc, json, os, sys
from mergefs.cli import main

def collections():
    return sum(generation["collections"] for generation in gc.get_stats())

def tell():
    facts = {
        "modules": sorted(sys.modules),
        "collections": collections() - before,
        "frozen": gc.get_freeze_count(),
        "threshold": gc.get_threshold()[0],
    }
    with open(os.environ["FACTS"], "w") as file:
        json.dump(facts, file)

atexit.register(tell)
before = collections()
sys.exit(main())
"""

ONLY_FOR: Final = {
    "budgets": ("mergefs.planner.spending", "mergefs.planner.selection", "mergefs.planner.prediction.prediction"),
    "planes": ("mergefs.planes.coded", "mergefs.planes.assumed"),
    "adapters": ("mergefs.checkpoint.adapter", "mergefs.planner.adapters", "mergefs.sources.adapted"),
    "numbers in quotes": ("pydantic",),
    "mistakes": ("difflib", "mergefs.methods.karcher"),
    "other methods": ("mergefs.methods.linear", "mergefs.methods.slerp", "mergefs.methods.sce"),
    "tables": ("rich",),
    "merged tokenizers": ("mergefs.tokenizer.service", "mergefs.sources.gathered", "importlib.metadata", "subprocess"),
}
"""What most merges do not have, and the modules that are imported for it alone."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended: what was imported, how often garbage was looked for, and the objects set aside.

    ``threshold`` is after how many new objects garbage was looked for in the end.
    """

    modules: frozenset[str]
    collections: int
    frozen: int
    threshold: int

    @property
    def needless(self) -> set[str]:
        """The modules that a plain merge does without."""
        return self.modules & {module for modules in ONLY_FOR.values() for module in modules}


def run(place: Path, *arguments: str | Path) -> Ended:
    """Run a command line as the process of its own that it is."""
    told = place / "facts.json"
    subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        env=environment(place) | {"FACTS": str(told)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    facts = json.loads(told.read_text())
    return Ended(frozenset(facts["modules"]), facts["collections"], facts["frozen"], facts["threshold"])


@pytest.fixture
def document(families: Families) -> dict[str, Any]:
    """Return a plain recipe: ties of two experts."""
    return recipe_document(METHODS["ties"], families(FamilyKind()))


def test_planning_a_plain_recipe_imports_nothing_that_only_others_need(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    ended = run(tmp_path, "plan", "--json", write_document(tmp_path / "recipe.yml", document))
    assert "mergefs.planner.build" in ended.modules
    assert ended.needless == set()


def test_materializing_a_plain_recipe_imports_nothing_that_only_others_need(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    recipe = write_document(tmp_path / "recipe.yml", document)
    ended = run(tmp_path, "materialize", "--json", recipe, tmp_path / "out")
    assert (tmp_path / "out" / "mergefs.manifest.json").is_file()
    assert ended.needless == set()
    assert ended.threshold == 700  # while it writes, garbage may be large


@pytest.mark.parametrize(
    ("need", "options", "change"),
    [
        ("budgets", ("--json", "--budget", "50%"), {}),
        ("numbers in quotes", ("--json",), {"parameters": {"lambda": "0.5"}}),
        ("mistakes", ("--json",), {"parameters": {"lamda": 0.5}}),
        ("tables", (), {}),
    ],
)
def test_what_a_recipe_needs_is_imported_with_it(
    tmp_path: Path, document: dict[str, Any], need: str, options: tuple[str, ...], change: dict[str, Any]
) -> None:
    recipe = write_document(tmp_path / "recipe.yml", document | change)
    assert run(tmp_path, "plan", *options, recipe).needless >= set(ONLY_FOR[need])


def test_garbage_is_looked_for_neither_while_a_command_starts_nor_at_its_end(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    ended = run(tmp_path, "plan", "--json", write_document(tmp_path / "recipe.yml", document))
    assert ended.collections == 0
    assert ended.frozen > 0


def test_the_collector_of_a_process_that_calls_the_command_line_is_its_own(tmp_path: Path) -> None:
    code = "import gc; from mergefs.cli import main; main(['--version']); print(gc.get_threshold())"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    default = subprocess.run(
        [sys.executable, "-c", "import gc; print(gc.get_threshold())"], capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1:] == default.stdout.splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_only_commands_that_run_models_let_threads_wait_for_products_of_matrices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")  # so that it is as before afterwards
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert main([name, "--help"]) == 0
    assert os.environ.get("OPENBLAS_NUM_THREADS") == (None if name in ("ab", "sweep", "demo") else "1")


def test_a_number_of_threads_that_the_user_asks_for_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert main(["plan", "--help"]) == 0
    assert os.environ["OPENBLAS_NUM_THREADS"] == "7"
