"""Whatever a recipe says, it is planned and can be read, or is refused in one sentence, as what mergekit refuses is."""

import contextlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_grammar import random_recipe
from tokenizers_recipes import build_in_this_process
from worlds import World, make_world

import mergefs
from mergefs.cli import main
from mergefs.tokenizer import service


@dataclass(frozen=True, slots=True)
class Workshop:
    """Models, a place for a recipe, and a catalog."""

    world: World
    recipe: Path
    catalog: Path

    def plan(self) -> tuple[int, str]:
        """Plan the recipe by the real command, and return its exit status and what it says on stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["--catalog", str(self.catalog), "plan", str(self.recipe)])
        assert status == 0 or out.getvalue() == ""
        return status, err.getvalue()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, catalogs: Path) -> Iterator[Workshop]:
    directory = tmp_path_factory.mktemp("fuzzed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "run_builder", build_in_this_process)
        patch.chdir(directory)
        yield Workshop(make_world(directory), directory / "recipe.yml", catalogs / "fuzzed")


def assert_one_sentence(stderr: str) -> None:
    assert stderr.startswith("mergefs: error: "), stderr
    assert stderr.endswith("\n"), stderr
    assert stderr[:-1].isprintable(), repr(stderr)
    assert "Traceback" not in stderr
    assert "internal error" not in stderr, stderr
    assert len(stderr) < 3000, stderr


def assert_answered(workshop: Workshop, data: bytes, chance: random.Random) -> int:
    """Plan a recipe; where that succeeds, read a few ranges. Return the exit status."""
    workshop.recipe.write_bytes(data)
    status, stderr = workshop.plan()
    if status == 0:
        assert stderr == ""
        with mergefs.open(workshop.recipe, catalog=workshop.catalog) as model:
            for name, size in model.files.sizes.items():
                start = chance.randrange(size + 1)
                length = min(chance.randrange(2000), size - start)
                assert len(model.read_file(name, start, length)) == length
    else:
        assert status in (1, 2)
        assert_one_sentence(stderr)
    return status


SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=300)
@given(seed=SEEDS)
def test_a_random_recipe_is_planned_and_read_or_refused_in_one_sentence(workshop: Workshop, seed: int) -> None:
    assert_answered(workshop, random_recipe(workshop.world, seed), random.Random(seed))


@pytest.mark.heavy
@settings(max_examples=2500)
@given(seed=SEEDS)
def test_many_random_recipes_are_planned_and_read_or_refused_in_one_sentence(workshop: Workshop, seed: int) -> None:
    assert_answered(workshop, random_recipe(workshop.world, seed), random.Random(seed))
