"""What the README shows can be typed as it stands."""

import ast
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from mergefs.cli.group import LazyGroup, cli
from mergefs.cli.registry import COMMANDS
from mergefs.recipe.model import parse_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str, pages: Sequence[Path] = PAGES) -> list[str]:
    return [text for page in pages for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands() -> list[list[str]]:
    lines = [
        line.removeprefix("$ ").split(" #")[0] for block in blocks("console", "bash") for line in block.splitlines()
    ]
    return [words for line in lines if line.startswith("mergefs ") and (words := shlex.split(line))]


def test_recipes_are_read() -> None:
    recipes = [text for text in blocks("yaml", pages=[README]) if "merge_method" in text]
    assert recipes
    for text in recipes:
        assert parse_recipe(text, "README.md").models


def test_python_is_python() -> None:
    assert blocks("python")
    for text in blocks("python"):
        ast.parse(text)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    assert isinstance(cli, LazyGroup)
    assert words[1] in COMMANDS
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words[2:] if word.startswith("-")} <= known
