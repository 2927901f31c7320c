"""Every method, over everything that its declaration lets vary, is as far from mergekit as is claimed and no further.

``docs/parity.md`` says what the matrix is. A sample of it is in every run, the rest in those with ``--all``.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family
from oracle import mergekit_merge
from parity_cases import (
    DTYPES,
    FAMILIES,
    FAMILY,
    Families,
    factors,
    families_below,
    matrix,
    recipe_of,
    refusal,
)
from parity_claims import CLAIMS, claim
from parity_matrix import run_rows
from parity_pairwise import Covering, Row
from parity_report import DOCUMENT, measurements, render, without_measurements
from parity_values import choices
from tensors import merge_by_mergefs

from mergefs.methods.registry import METHODS

DECIDED = "of them decided by chance or one rounding"

SAMPLE = 1
"""Rows for each kind of family that are in every run: the first ones, which add most pairs."""

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module")
def parity_families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return families_below(tmp_path_factory.mktemp("parity"))


Matrices = Callable[[str], Covering]


@pytest.fixture(scope="module")
def matrices(parity_families: Families, tmp_path_factory: pytest.TempPathFactory) -> Matrices:
    """Return a function that gives a method's matrix, which is found once."""
    directory = tmp_path_factory.mktemp("recipes")
    return lru_cache(maxsize=None)(lambda method: matrix(method, parity_families, directory))


def in_every_run(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of a matrix that are in every run."""
    rows = list(rows)
    return [row for family in FAMILIES for row in [row for row in rows if row[FAMILY] == family][:SAMPLE]]


@EVERY_METHOD
@EVERY_DTYPE
def test_a_sample_of_the_matrix_is_as_near_to_mergekit_as_is_claimed(
    tmp_path: Path, parity_families: Families, matrices: Matrices, method: str, dtype: str
) -> None:
    rows = in_every_run(matrices(method).rows)
    assert {row[FAMILY] for row in rows} == set(FAMILIES)
    assert run_rows(method, dtype, rows, parity_families, tmp_path).failures == ()


@pytest.mark.heavy
@EVERY_METHOD
@EVERY_DTYPE
def test_the_rest_of_the_matrix_is_as_near_to_mergekit_as_is_claimed(
    tmp_path: Path, parity_families: Families, matrices: Matrices, method: str, dtype: str
) -> None:
    sample = in_every_run(matrices(method).rows)
    rows = [row for row in matrices(method).rows if row not in sample]
    assert run_rows(method, dtype, rows, parity_families, tmp_path).failures == ()


@EVERY_METHOD
def test_what_cannot_be_together_in_a_recipe_is_refused_by_mergekit_too(
    tmp_path: Path, parity_families: Families, matrices: Matrices, method: str
) -> None:
    specification = METHODS[method].specification
    for pair, row in matrices(method).impossible.items():
        document = recipe_of(specification, row, "bfloat16", parity_families(row[FAMILY], "bfloat16"))
        assert refusal(document, tmp_path), pair
        with pytest.raises((RuntimeError, ValueError)):
            mergekit_merge(document)


@EVERY_METHOD
def test_the_matrix_varies_every_parameter_of_a_method(method: str) -> None:
    specification = METHODS[method].specification
    for parameter in specification.parameters:
        ways = choices(parameter)
        assert factors(specification)[parameter.name] == tuple(ways)
        assert any("gradient" in name for name in ways)
        assert any("filter" in name for name in ways)
        assert ("left out" in ways) is not parameter.required
        written = str(list(ways.values()))
        for edge in (parameter.minimum, parameter.maximum):
            assert edge is None or edge == parameter.default or str(edge) in written


def test_claims_are_made_of_methods_that_there_are() -> None:
    assert CLAIMS.keys() <= METHODS.keys()


# The document


def test_the_document_says_what_is_claimed_of_every_method_and_dtype() -> None:
    """Run ``scripts/parity.py`` where this fails."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert without_measurements(text) == without_measurements(render({}, {}))


@EVERY_METHOD
def test_the_document_tells_of_the_whole_matrix_and_of_nothing_beyond_the_claims(
    matrices: Matrices, method: str
) -> None:
    measured = measurements(DOCUMENT.read_text(encoding="utf-8"))
    for dtype in DTYPES:
        row = measured[method, dtype]
        assert int(row["cases"]) == len(matrices(method).rows)
        assert int(row["elements compared"]) > 25_000 * int(row["cases"])
        assert row["NaN or infinity in mergekit alone"] == "0" or claim(method).may_break(dtype)
        assert row["bits equal, nothing left to chance"] == "all" or claim(method).fixed[dtype]
        if claim(method).random:
            continue
        assert float(row["largest of the others, in units"]) <= claim(method).untouched[dtype]
        assert row[DECIDED] == "0" or claim(method).selects
        others = int(row["differ from mergekit as it is"]) - int(row[DECIDED])
        assert others == 0 or claim(method).untouched[dtype]


# What is not followed


def zero_sum(family: Family) -> dict[str, Any]:
    """Return a recipe with weights that sum to zero and divide."""
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(family.experts, (0.5, -0.5), strict=False)
    ]
    parameters = {"normalize": True}
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": models,
        "parameters": parameters,
    }


@EVERY_DTYPE
def test_a_sum_of_weights_that_is_zero_divides_nothing_also_in_float16_where_mergekit_writes_infinities(
    tmp_path: Path, parity_families: Families, dtype: str
) -> None:
    document = zero_sum(parity_families("Llama", dtype))
    ours, theirs = merge_by_mergefs(tmp_path, document), mergekit_merge(document)
    assert all(bool(tensor.isfinite().all()) for tensor in ours.values())
    finite = all(bool(tensor.isfinite().all()) for tensor in theirs.values())
    assert finite is (dtype != "float16")
    for name, tensor in theirs.items():
        followed = tensor.isfinite() & (ours[name] == tensor)
        assert torch.equal(followed, tensor.isfinite()) or not finite, name
