"""``mergefs sweep``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergefs.cli.evaluation import evaluation_arguments
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergefs.evaluation.grid import Axis, Cell


@click.command(name="sweep")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "settings_",
    metavar="KEY=VALUE,VALUE...",
    multiple=True,
    required=True,
    help="Values for a parameter, a model's own (weight.2), budget, method or dtype; repeatable.",
)
@evaluation_arguments
@click.option(
    "--csv",
    "csv_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Save the table there.  [default: RECIPE.sweep.csv here]",
)
@click.option(
    "--plot",
    metavar="FILE.png",
    type=click.Path(path_type=Path),
    help="Save the picture there.  [default: RECIPE.sweep.png here, where matplotlib is installed]",
)
@click.option("--no-save", is_flag=True, help="Print the table, and save nothing that is not named.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    recipe: Path,
    settings_: tuple[str, ...],
    text: Path,
    running: dict[str, Any],
    opening: dict[str, Any],
    csv_file: Path | None,
    plot: Path | None,
    no_save: bool,
    as_json: bool,
) -> None:
    """Run every combination of some values of a recipe on held-out text, without writing any model.

    The last --set is the one that the picture has along its axis.
    """
    from mergefs.cli.files import write_whole
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.evaluation.comparison import Settings as Running
    from mergefs.evaluation.comparison import measure
    from mergefs.evaluation.grid import (
        Cell,
        can_draw,
        combinations,
        draw,
        parse_axes,
        require_drawing,
        table,
        variant_text,
    )
    from mergefs.evaluation.loading import load_model
    from mergefs.evaluation.text import read_text
    from mergefs.reports.curve import format_of

    axes, content = parse_axes(settings_), read_text(text)
    if not no_save:
        csv_file = csv_file or Path(f"{recipe.stem}.sweep.csv")
        if plot is None and can_draw():
            plot = Path(f"{recipe.stem}.sweep.png")
    kind = None if plot is None else format_of(plot)
    if plot is not None:
        require_drawing()  # now, and not when everything has been run
    cells: list[Cell] = []
    with progress(settings.quiet) as listener:
        for values in combinations(axes):
            variant = recipe.with_name(f"{recipe.name}@{variant_text(axes, values)}")
            loaded = load_model(variant, catalog=settings.catalog, **opening)
            cells.append(Cell(values, measure(loaded, content, Running(**running), listener)))
            if csv_file is not None:  # after each: what took minutes outlives an error of the next one
                write_whole(csv_file, table(axes, cells))
    if plot is not None and kind is not None:
        write_whole(plot, draw(axes, cells, recipe.name, kind))
    if as_json:
        keys = [axis.key for axis in axes]
        print_json([{**dict(zip(keys, cell.values, strict=True)), **asdict(cell.measured)} for cell in cells])
        return
    _print(axes, cells)
    for written in (csv_file, plot) if not settings.quiet else ():
        if written is not None:
            click.echo(f"wrote {written}")


def _print(axes: "Sequence[Axis]", cells: "Sequence[Cell]") -> None:
    """Print the grid; the best perplexity is marked."""
    from mergefs.cli.output import print_table
    from mergefs.units import format_size

    best = min(cell.measured.perplexity for cell in cells)
    rows = [
        (
            *cell.values,
            f"{cell.measured.perplexity:.4f}" + (" *" if cell.measured.perplexity == best else "  "),
            f"{cell.measured.predicted_relative_error or 0:.4f}",
            format_size(cell.measured.expert_bytes_read or 0),
            cell.measured.plan_id or "-",
        )
        for cell in cells
    ]
    count = len(axes)
    columns = (*(axis.key for axis in axes), "perplexity  ", "predicted error", "experts read", "plan")
    print_table(columns, rows, numeric=(*range(count), count, count + 1, count + 2))
    click.echo(f"* is the best, on {cells[0].measured.tokens} tokens")
