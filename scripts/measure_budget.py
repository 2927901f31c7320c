#!/usr/bin/env python3
"""Measure what a budget buys, by every rule to spend it, on families that are trained for it; write docs/budget.md.

usage: .venv/bin/python scripts/measure_budget.py DIR

DIR keeps the trained families, their catalogs and every measurement, so that an interrupted run goes on where it was;
a fresh one takes about an hour on two cores.
"""

import sys
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from budget_study.families import KINDS, smaller  # noqa: E402 - after the path that it is on
from budget_study.figures import draw_all, draw_one  # noqa: E402
from budget_study.recipes import MERGES  # noqa: E402
from budget_study.report import measured_section, verdicts, with_section  # noqa: E402
from budget_study.study import run_study  # noqa: E402

BUDGETS: Final = ("6.25%", "12.5%", "25%", "50%")
ALL_FIGURE: Final = "figures/budget.png"
ONE_FIGURE: Final = "figures/budget-task-arithmetic.png"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--document",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=ROOT / "docs" / "budget.md",
    help="The page whose measured part is written anew; its figures lie beside it in figures/.",
)
@click.option("--quick", is_flag=True, help="Tiny models, one method, two budgets: to see that everything runs.")
def main(directory: Path, document: Path, quick: bool) -> None:
    """Measure what a budget buys, on families trained below DIRECTORY, and write it into a page of the documentation.

    Ends with status 1 where the figures do not bear out what the page claims.
    """
    kinds = tuple(map(smaller, KINDS)) if quick else KINDS
    budgets = BUDGETS[1:3] if quick else BUDGETS
    families = run_study(
        directory, kinds, budgets, MERGES[:1] if quick else MERGES, lambda line: click.echo(line, err=True)
    )
    draw_all(families, budgets, document.parent / ALL_FIGURE)
    draw_one(families[0], budgets, document.parent / ONE_FIGURE)
    section = measured_section(families, budgets, ALL_FIGURE)
    document.write_text(with_section(document.read_text(encoding="utf-8"), section), encoding="utf-8")
    found = verdicts(families, budgets)
    for verdict in found:
        click.echo(f"{'ok    ' if verdict.holds else 'FAILED'} {verdict.claim}")
    sys.exit(0 if all(verdict.holds for verdict in found) else 1)


if __name__ == "__main__":
    main()
