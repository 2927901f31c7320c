"""Every method in every form of a recipe gives the bits of mergekit's merge, with nothing left to chance."""

from pathlib import Path

import pytest
from examples import METHODS
from parity_cases import DTYPES
from parity_structures import STRUCTURES, Worlds, compare, worlds_below
from tokenizers_recipes import quick_builder

from mergefs.methods import registry

__all__ = ["quick_builder"]

MOST = pytest.mark.heavy
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=() if dtype == "bfloat16" else MOST) for dtype in DTYPES]
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return worlds_below(tmp_path_factory.mktemp("worlds"))


def test_every_method_has_a_merge() -> None:
    assert METHODS.keys() == registry.METHODS.keys()


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", STRUCTURES)
@EVERY_DTYPE
def test_a_merge_in_another_form_equals_mergekit(
    tmp_path: Path, worlds: Worlds, structure: str, method: str, dtype: str
) -> None:
    assert compare(structure, method, worlds(dtype), tmp_path).differing == 0
