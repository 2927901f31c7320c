"""What the demo shows while it works, and its table."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import click

from mergefs.demo.training import Report
from mergefs.units import format_size

_LINES_PER_STAGE: Final = 4
"""How often a stage of training is reported where there is no terminal to show a bar on."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: its perplexity on each domain, and for a merge the expert bytes planned and read."""

    model: str
    perplexities: tuple[float, ...]
    planned: int | None = None
    read: int | None = None


@contextmanager
def training_progress() -> Iterator[Report]:
    """Lend a report function: a bar on a terminal, else a few lines for each stage."""
    if not sys.stderr.isatty():
        yield _print_some_steps
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        bars = {}

        def report(title: str, step: int, steps: int, loss: float) -> None:
            if title not in bars:
                bars[title] = display.add_task(title, total=steps, loss=loss)
            display.update(bars[title], completed=step, loss=loss)

        yield report


def _print_some_steps(title: str, step: int, steps: int, loss: float) -> None:
    """Print a line now and then."""
    if step % max(1, steps // _LINES_PER_STAGE) == 0 or step == steps:
        click.echo(f"  {title}: step {step} of {steps}, loss {loss:.3f}", err=True)


def show_table(domains: Sequence[str], rows: Sequence[Row]) -> None:
    """Print the table; the best figure of each domain is bold."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="held-out perplexity for each byte (lower is better)")
    table.add_column("model", no_wrap=True)
    for name in (*domains, "expert bytes planned", "really read"):
        table.add_column(name, justify="right")
    best = [min(row.perplexities[index] for row in rows) for index in range(len(domains))]
    for row in rows:
        figures = [
            f"[bold]{value:.3f}[/bold]" if value == least else f"{value:.3f}"
            for value, least in zip(row.perplexities, best, strict=True)
        ]
        table.add_row(row.model, *figures, *_byte_columns(row))
    Console().print(table)


def markdown_table(domains: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the same table for a README."""
    names = ("model", *domains, "expert bytes planned", "really read")
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for row in rows:
        figures = [f"{value:.3f}" for value in row.perplexities]
        lines.append("| " + " | ".join((row.model, *figures, *_byte_columns(row))) + " |")
    return "\n".join(lines) + "\n"


def _byte_columns(row: Row) -> tuple[str, str]:
    """Return the last two columns."""
    return ("", "") if row.planned is None or row.read is None else (format_size(row.planned), format_size(row.read))
