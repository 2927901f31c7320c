"""Explanations for a terminal of 80 columns: heat maps whose cells are numbers, on colours where there are any."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergefs.reports.colours import BOUGHT_LIGHT, ERROR_LIGHT, Scale, step
from mergefs.reports.explanation import ExpertReport, Explanation
from mergefs.reports.heatmap import Panel, short_ends
from mergefs.reports.spending import Amount
from mergefs.reports.wording import EQUAL, bought, error, percent
from mergefs.units import format_size

WIDTH: Final = 80
MOST_ROWS: Final = 16
_CELL: Final = 6
"""Columns of a cell, and of a word of a kind's name above it."""

_SHORT: Final = {"layernorm": "norm", "attention": "attn", "feedforward": "ffn"}
"""Words of tensor names that would take two lines above a column."""

Show = Callable[[Amount], tuple[str, float | None]]
"""What stands in a cell, and the share that its colour shows."""


def render(explanation: Explanation, most_rows: int = MOST_ROWS, width: int = WIDTH) -> Iterator[RenderableType]:
    """Yield what is to be printed, in turn. Neighbouring layers share a row where there are more than ``most_rows``."""
    yield _pairs(explanation)
    yield _summary(explanation)
    for expert in explanation.experts:
        yield from _heat_maps(expert, most_rows, width)
    yield Text(f"{EQUAL} nothing to read: the base, or another expert, has the same bytes", style="dim")
    if explanation.reading is not None:
        yield from _readings(explanation)
    for note in explanation.notes:
        yield Text(f"note: {note}")


def _pairs(explanation: Explanation) -> Text:
    """Return names and values in two columns."""
    width = max(map(len, explanation.facts))
    return Text("\n".join(f"{name:<{width}}  {value}" for name, value in explanation.facts.items()))


def _table(*columns: str, left: int = 1) -> Table:
    """Return a table whose columns are numbers, but for the first ``left`` ones."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def _summary(explanation: Explanation) -> Table:
    table = _table("expert", "size", "bought", "share", "free", "error left")
    for expert in explanation.experts:
        amount = expert.amount
        table.add_row(
            Text(expert.label),
            format_size(amount.total),
            format_size(amount.planned),
            f"{percent(amount.bought)} %",
            format_size(amount.free),
            f"{error(amount)} %",
        )
    return table


def _heat_maps(expert: ExpertReport, most_rows: int, width: int) -> Iterator[RenderableType]:
    """Yield the two heat maps of one expert; none where there is nothing to see on them."""
    if expert.amount.left == 0:
        yield Text(f"{expert.label}: nothing is left out, since all that differs from the base is read\n", style="bold")
        return
    maps: tuple[tuple[str, Show, Scale], ...] = (
        ("bytes bought, %", lambda amount: (bought(amount), amount.bought), BOUGHT_LIGHT),
        ("error left, % of the expert's delta", lambda amount: (error(amount), amount.error), ERROR_LIGHT),
    )
    for title, show, scale in maps:
        yield Text(f"{expert.label}: {title}", style="bold")
        for panel in expert.panels(most_rows):
            yield from _tables(panel, show, scale, width)


def _tables(panel: Panel, show: Show, scale: Scale, width: int) -> Iterator[Table]:
    """Yield a heat map in as many tables as its columns need."""
    labels = [_folded(label) for label in short_ends(panel.kinds, ".")]
    head = panel.title.rpartition(".")[2] if panel.rows != ("",) else ""
    beside = max(len(head), *map(len, panel.rows))
    at_once = max(1, (width - beside) // (_CELL + 1))
    for first in range(0, len(labels), at_once):
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column(head, justify="right", no_wrap=True, width=beside, vertical="bottom")
        for label in labels[first : first + at_once]:
            table.add_column(Text(label), justify="center", width=_CELL, no_wrap=True)
        for name, cells in zip(panel.rows, panel.cells, strict=True):
            table.add_row(name, *(_cell(cell, show, scale) for cell in cells[first : first + at_once]))
        table.add_section()
        table.add_row("")
        yield table


def _cell(amount: Amount | None, show: Show, scale: Scale) -> Text:
    """Return one number on its colour; nothing where the expert has no such tensor."""
    if amount is None:
        return Text("")
    shown, share = show(amount)
    if shown == EQUAL or share is None:
        return Text(shown.center(_CELL), style="dim")
    number = step(share)
    return Text(shown.center(_CELL), style=f"{scale.ink(number)} on {scale.colour(number)}")


def _folded(label: str) -> str:
    """Return the name of a kind in lines of the width of a cell, cut between its words where that is possible."""
    words = [_SHORT.get(word, word) for word in label.replace("_", " ").replace(".", " ").split()]
    lines: list[str] = []
    for word in words:
        while len(word) > _CELL:
            lines.append(word[: _CELL - 1] + "-")
            word = word[_CELL - 1 :]
        if lines and len(lines[-1]) + 1 + len(word) <= _CELL and not lines[-1].endswith("-"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _readings(explanation: Explanation) -> Iterator[RenderableType]:
    """Yield what was planned beside what was really read, for each expert and kind of tensor."""
    reading = explanation.reading
    if reading is None:
        return
    yield Text(f"\nplanned and really read, by {reading.how} until {reading.when}", style="bold")
    table = _table("expert", "kind", "planned", "read", "of the plan", left=2)
    for expert in explanation.experts:
        rows: Sequence[tuple[str, Amount]] = [*expert.by_kind().items(), ("all", expert.amount)]
        for index, (kind, amount) in enumerate(rows):
            read = amount.read or 0
            table.add_row(
                Text(expert.label if index == 0 else ""),
                Text(kind, style="bold" if kind == "all" else ""),
                format_size(amount.planned),
                format_size(read),
                f"{read / amount.planned:.1%}" if amount.planned else "-",
                end_section=kind == "all",
            )
    yield table
    yield Text(f"read again, since a cache had dropped it: {format_size(reading.again)}")
