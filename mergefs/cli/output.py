"""What commands print: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import click

_UNBOUNDED: Final = 10_000


def print_json(content: object) -> None:
    """Print ``content`` as indented JSON."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def print_note(sentence: str) -> None:
    """Print something worth knowing on stderr, where it is in no program's way."""
    click.echo(f"mergefs: note: {sentence}", err=True)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print names and values in two aligned columns."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name:<{width}}  {value}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """Print rows under their column names; columns whose index is in ``numeric`` are flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal there is no width to wrap at: a program or a file gets whole lines.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNBOUNDED).print(table)
