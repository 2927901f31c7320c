"""``mergefs explain``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergefs.cli.options import MERGEKIT_EPILOG, PlanArguments, plan_arguments
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.reports.explanation import Explanation
    from mergefs.reports.spending import Amount


@click.command(name="explain", epilog=MERGEKIT_EPILOG)
@click.argument("recipe", metavar="RECIPE_OR_PLAN", type=click.Path(path_type=Path))
@plan_arguments
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page for a browser to FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, recipe: Path, arguments: PlanArguments, html: Path | None, as_json: bool) -> None:
    """Show where the bytes of a budget go: heat maps, layers x kinds of tensors, of what is bought and what is left.

    RECIPE_OR_PLAN is a recipe, or the id of a plan, of which the beginning is enough. Once the plan has been read, what
    was planned stands beside what was really read.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.targets import plan_target
    from mergefs.reports.explanation import explain

    workspace = Workspace.create(Catalog(settings.catalog or default_location()))
    try:
        with progress(settings.quiet) as listener:
            plan = plan_target(recipe, arguments.options(), workspace, listener)
        explanation = explain(plan, workspace)
    finally:
        workspace.close()
    if html is not None:
        _write_page(html, explanation)
    if as_json:
        print_json(_json(explanation))
    elif html is None:
        _print(explanation)
    elif not settings.quiet:
        click.echo(f"wrote {html}")


def _write_page(path: Path, explanation: "Explanation") -> None:
    """Write the page, whole or not at all."""
    from mergefs.cli.files import write_whole
    from mergefs.reports.page import render

    write_whole(path, render(explanation).encode())


def _print(explanation: "Explanation") -> None:
    """Print the explanation for people."""
    from rich.console import Console

    from mergefs.reports.terminal import WIDTH, render

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    for part in render(explanation, width=min(console.width, 2 * WIDTH)):
        console.print(part)


def _json(explanation: "Explanation") -> dict[str, object]:
    """Return the explanation for programs."""
    reading = explanation.reading
    return {
        **{name.replace(" ", "_"): value for name, value in explanation.facts.items()},
        "experts": [
            {
                "reference": expert.reference,
                **_amount(expert.amount),
                "tensors": [
                    {"name": entry.tensor, "shape": list(entry.shape), **_amount(entry.amount)}
                    for entry in expert.spendings
                ],
            }
            for expert in explanation.experts
        ],
        "reading": None
        if reading is None
        else {"how": reading.how, "when": reading.when, "bytes_read_again": reading.again},
        "notes": list(explanation.notes),
    }


def _amount(amount: "Amount") -> dict[str, Any]:
    return {
        "bytes_total": amount.total,
        "bytes_planned": amount.planned,
        "bytes_free": amount.free,
        "bytes_read": amount.read,
        "relative_error_left": amount.error,
    }
