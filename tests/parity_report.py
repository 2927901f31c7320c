"""Writes ``docs/parity.md`` from the claims and from what a run of the whole matrix measured."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from parity_cases import DTYPES, FAMILIES, MOST_EXPERTS
from parity_claims import Claim, claim
from parity_comparison import Difference
from parity_matrix import Outcome
from parity_structures import STRUCTURES

from mergefs.methods.registry import METHODS

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "parity.md"

Outcomes = Mapping[tuple[str, str], Outcome]
"""What was measured, by method and dtype."""

Forms = Mapping[str, Difference]
"""What was measured, by the form of a recipe."""

_COLUMNS: Final = (
    "method",
    "dtype",
    "cases",
    "elements compared",
    "bits equal, nothing left to chance",
    "NaN or infinity in mergekit alone",
    "differ from mergekit as it is",
    "of them decided by chance or one rounding",
    "largest of the others, in units",
    "allowed of these",
)
_NOT_COMPARED: Final = "other masks"
_MEASURED: Final = range(2, 9)
"""The columns that a run of the matrix fills in."""

_INTRODUCTION: Final = """\
# Parity with mergekit

Every method is compared with mergekit 0.1.5 itself, which the tests run in the same process. This page is written by
`scripts/parity.py`, with the code of the tests; they hold every case against what is allowed here, and this page
against themselves.

## What is compared

For every method the tests take from its own declaration what can be varied, and make recipes in which every value of
everything meets every value of everything else (all pairs):

* the models: {families};
  a base and up to {experts} experts, a fifth of whose elements equal the base's,
* the dtype that they are stored and merged in, and whether the recipe names it,
* whether there is a base, and whether it is listed among the models,
* every parameter: left out, at the ends of its range, ordinary, for all models and for each its own, a gradient over
  the layers, conditions by filter, and conditions that hold gradients.

All elements of all tensors are compared by their bits, only NaN counts as NaN. Each recipe is merged by mergekit twice:

* **with nothing left to chance**: which of several equal magnitudes survives is decided by one rule, random masks are
  ours, and what depends on the machine (long sums in an order of its own, sines and arc cosines of its mathematical
  library) is taken in float64 and rounded once. What is left must be equal bit for bit.
* **as it is**, on one thread: only what was fixed there may differ, and by no more than the last column allows. A unit
  is the distance of neighbouring numbers of the dtype at the largest of the inputs and of both results, since it is the
  rounding of those that differs. Methods with random masks are held against mergekit as it is by what the masks do on
  average.

## Method by method
"""

_FORMS: Final = """
## In every form of a recipe

A merge by every method in every dtype of the table, written in each of these forms, has the bits of mergekit's with
nothing left to chance:
"""

_REASONS: Final = "\n## Why methods differ from mergekit as it is\n"

_ON_PURPOSE: Final = """
## What is not followed
"""

_EVERYWHERE: Final = (
    "A tensor that mergekit's list of an architecture does not know is dropped by mergekit and merged here. All others "
    "are compared.",
    "Where mergekit writes float32 because a method ends in it ({widened}), the result is rounded here to the dtype of "
    "the recipe, and compared with mergekit's, rounded to it.",
    "From five float32 experts on, torch adds up the last elements of a tensor in another order than the others. The "
    "matrix has at most four.",
)


def render(outcomes: Outcomes, forms: Forms, earlier: str = "") -> str:
    """Return the text of the document; what was not measured now is taken from the text of an ``earlier`` one."""
    lines = [_INTRODUCTION.format(families=", ".join(FAMILIES), experts=MOST_EXPERTS)]
    lines += [_table_row(_COLUMNS), _table_row(["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2))]
    before = measurements(earlier)
    for method in METHODS:
        for dtype in DTYPES:
            row = _row(method, dtype, outcomes.get((method, dtype), Outcome()))
            if (method, dtype) in before and (method, dtype) not in outcomes:
                kept = list(before[method, dtype].values())
                row = [kept[number] if number in _MEASURED else cell for number, cell in enumerate(row)]
            lines.append(_table_row(row))
    lines += [_FORMS, _table_row(("form", "merges", "elements compared")), _table_row(["---", "---:", "---:"])]
    counted = dict(_forms_of(earlier)) | {form: str(found.elements) for form, found in forms.items()}
    cases = str(len(METHODS) * len(DTYPES))
    lines += [_table_row((form, cases, counted.get(form, "0"))) for form in STRUCTURES]
    lines.append(_REASONS)
    for reason in dict.fromkeys(claim(method).reason for method in METHODS):
        methods = _listed(method for method in METHODS if claim(method).reason == reason)
        lines.append(_item(f"{methods}: {reason or 'they do not'}."))
    lines.append(_ON_PURPOSE)
    for broken in dict.fromkeys(claim(method).breaks for method in METHODS):
        if broken is not None:
            methods = _listed(method for method in METHODS if claim(method).breaks == broken)
            where = f" in {_listed(broken.dtypes)}" if broken.dtypes else ""
            lines.append(_item(f"{methods}{where}: {broken.reason}."))
    for method in METHODS:
        if claim(method).fails:
            lines.append(_item(f"`{method}` fails in mergekit where {claim(method).fails}."))
    widened = _listed(method for method in METHODS if claim(method).widened)
    lines += [_item(text.format(widened=widened)) for text in _EVERYWHERE]
    return "\n".join(lines) + "\n"


def _row(method: str, dtype: str, outcome: Outcome) -> list[str]:
    fixed, untouched, claimed = outcome.fixed, outcome.untouched, claim(method)
    off = fixed.unexplained
    return [
        method,
        dtype,
        str(outcome.cases),
        str(fixed.elements),
        "all" if off == 0 else f"all but {off}, by up to {fixed.units:.1f} units",
        str(fixed.broken),
        *((_NOT_COMPARED,) * 3 if claimed.random else _as_it_is(untouched)),
        _allowed(claimed, dtype),
    ]


def _as_it_is(untouched: Difference) -> tuple[str, str, str]:
    return str(untouched.differing - untouched.broken), str(untouched.by_chance), f"{untouched.units:.1f}"


def _allowed(claimed: Claim, dtype: str) -> str:
    """Say by how much a method may differ in a dtype."""
    if claimed.random:
        return _NOT_COMPARED
    limits = []
    if claimed.fixed[dtype]:
        limits.append(f"{claimed.fixed[dtype]:g} with nothing left to chance")
    limits.append(f"{claimed.untouched[dtype]:g}" if claimed.untouched[dtype] else "none")
    return ", ".join(limits)


def _item(text: str) -> str:
    """Return an item of a list, in lines as long as everywhere."""
    return textwrap.fill(text, 118, initial_indent="* ", subsequent_indent="  ", break_on_hyphens=False)


def _listed(methods: Iterable[str]) -> str:
    return ", ".join(f"`{method}`" for method in methods)


def _table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def without_measurements(text: str) -> str:
    """Return the text of the document without what a run of the matrix fills in."""
    lines = []
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("|") and len(cells) == len(_COLUMNS) and cells[0] in METHODS:
            line = _table_row(["" if number in _MEASURED else cell for number, cell in enumerate(cells)])
        if line.startswith("|") and cells[0] in STRUCTURES:
            line = _table_row(cells[:-1])
        lines.append(line)
    return "\n".join(lines)


def _forms_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield each form of a recipe in the table of a document, with how many elements were compared."""
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("|") and cells[0] in STRUCTURES:
            yield cells[0], cells[-1]


def measurements(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return what the table of a document says of each method and dtype, by column."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {
        (cells[0], cells[1]): dict(zip(_COLUMNS, cells, strict=True))
        for cells in rows
        if len(cells) == len(_COLUMNS) and cells[0] in METHODS
    }
