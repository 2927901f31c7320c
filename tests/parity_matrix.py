"""Runs cases of the parity matrix: mergefs, mergekit with nothing left to chance, and mergekit as it is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import Family
from oracle import mergekit_merge, nothing_left_to_chance, selections_noted
from parity_cases import FAMILY, Families, recipe_of
from parity_claims import Claim, claim
from parity_comparison import NOTHING, Difference, difference
from parity_pairwise import Row
from tensors import Tensors, load_model, merge_by_mergefs

from mergefs.methods.registry import METHODS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of some cases of a method in a dtype; two add up to that of both.

    ``fixed`` and ``untouched`` compare with mergekit as ``parity_claims`` says; ``failed`` counts cases in which
    mergekit failed, and ``failures`` names those that were further away than is claimed.
    """

    cases: int = 0
    failed: int = 0
    fixed: Difference = NOTHING
    untouched: Difference = NOTHING
    failures: tuple[str, ...] = ()

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.cases + other.cases,
            self.failed + other.failed,
            self.fixed + other.fixed,
            self.untouched + other.untouched,
            self.failures + other.failures,
        )


def run_rows(method: str, dtype: str, rows: Iterable[Row], families: Families, directory: Path) -> Outcome:
    """Run rows of a method's matrix in a dtype."""
    total = Outcome()
    for row in rows:
        family = families(row[FAMILY], dtype)
        document = recipe_of(METHODS[method].specification, row, dtype, family)
        found = _run(document, family, directory)
        failure = _failure(claim(method), dtype, found)
        total += replace(found, failures=(f"{failure}: {row}",) if failure else ())
    return total


def _run(document: dict[str, Any], family: Family, directory: Path) -> Outcome:
    method = document["merge_method"]
    claimed = claim(method)
    ours = merge_by_mergefs(directory, document)
    inputs = [_loaded(Path(entry["model"])) for entry in document["models"]]
    inputs += [_loaded(family.base)] if "base_model" in document else []

    def compared(theirs: Tensors, by_chance: Callable[[str], torch.Tensor | None] = lambda name: None) -> Difference:
        if claimed.widened:
            theirs = {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
        assert ours.keys() == theirs.keys()
        return difference(ours, theirs, inputs, by_chance)

    try:
        with nothing_left_to_chance(method), selections_noted() as by_rule:
            fixed = compared(mergekit_merge(document))
    except ValueError as error:
        assert claimed.fails, error
        assert all(bool(tensor.isfinite().all()) for tensor in ours.values())
        return Outcome(1, failed=1)
    if claimed.identical or claimed.random:
        return Outcome(1, 0, fixed, fixed if claimed.identical else NOTHING)
    with selections_noted() as as_it_is:
        theirs = mergekit_merge(document)
    return Outcome(1, 0, fixed, compared(theirs, lambda name: by_rule.differing(as_it_is, name)))


@lru_cache(maxsize=256)
def _loaded(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path)


def _failure(claimed: Claim, dtype: str, outcome: Outcome) -> str:
    """Return by what a case breaks a claim, or nothing."""
    if outcome.fixed.broken and not claimed.may_break(dtype):
        return f"{outcome.fixed} where mergekit breaks"
    if not outcome.fixed.within(claimed.fixed[dtype]):
        return f"{outcome.fixed} where nothing is left to chance"
    if not outcome.untouched.within(claimed.untouched[dtype]):
        return f"{outcome.untouched} against mergekit as it is"
    return ""
