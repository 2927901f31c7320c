"""Any byte range of any merge by any method can be computed on its own, by an engine that knows nothing else.

The recipes are those of the parity matrix, taken at random: so every parameter that a method declares is varied, and a
new method is here as soon as it is in the registry.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from parity_cases import DTYPES, FAMILY, Families, factors, families_below, recipe_of, refusal
from recipes import write_document
from test_independence import STRUCTURES
from tokenizers_recipes import quick_builder
from worlds import World, make_world

from mergefs.catalog import Catalog
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.methods.registry import METHODS
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks

__all__ = ["quick_builder"]

SMALL = 500
"""Elements of a block where ranges are read: most tensors have several, the last one ragged."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where recipes and catalogs of the test are written, and the models that recipes are about."""

    directory: Path
    families: Families

    @contextmanager
    def engine(self, recipe: Path) -> Iterator[Engine]:
        """Give an engine that has nothing but the recipe: an empty catalog, and no cache."""
        with tempfile.TemporaryDirectory(dir=self.directory) as catalog:
            workspace = Workspace.create(Catalog(Path(catalog)), 0)
            yield Engine(make_plan(load_recipe(recipe), PlanOptions(), workspace), workspace, strict=False)
            workspace.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, catalogs: Path) -> Place:
    return Place(catalogs, families_below(tmp_path_factory.mktemp("ranges")))


def recipes_of(method: str) -> st.SearchStrategy[tuple[dict[str, str], str]]:
    """Return values for everything that is varied for a method, and a dtype."""
    values = {name: st.sampled_from(names) for name, names in factors(METHODS[method].specification).items()}
    return st.tuples(st.fixed_dictionaries(values), st.sampled_from(list(DTYPES)))


def assert_ranges_equal_the_whole(place: Place, document: Any, data: st.DataObject) -> None:
    recipe = write_document(place.directory / "recipe.yml", document)
    with place.engine(recipe) as engine:
        (file,) = engine.plan.files
        whole = engine.read_file(file.name, 0, file.size)
    assert len(whole) == file.size
    borders = st.sampled_from(file.offsets).flatmap(lambda border: st.integers(border - 5, border + 5))
    starts = (st.integers(0, file.size) | borders).map(lambda start: min(max(start, 0), file.size))
    for start, size in data.draw(st.lists(st.tuples(starts, st.integers(0, 5000)), min_size=1, max_size=4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "BLOCK_ELEMENTS", SMALL)
            with place.engine(recipe) as alone:
                assert alone.read_file(file.name, start, size) == whole[start : start + size]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(data=st.data())
def test_a_range_that_is_computed_on_its_own_is_what_the_whole_holds_there(
    place: Place, method: str, data: st.DataObject
) -> None:
    row, dtype = data.draw(recipes_of(method))
    document = recipe_of(METHODS[method].specification, row, dtype, place.families(row[FAMILY], dtype))
    assume(refusal(document, place.directory) is None)
    assert_ranges_equal_the_whole(place, document, data)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize("structure", STRUCTURES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_range_of_a_structure_that_is_computed_on_its_own_is_what_the_whole_holds_there(
    place: Place, world: World, structure: str, data: st.DataObject
) -> None:
    """Slices, vocabularies, adapters and merges of merges; nothing of what they take part in is known beforehand."""
    assert_ranges_equal_the_whole(place, STRUCTURES[structure](world), data)
