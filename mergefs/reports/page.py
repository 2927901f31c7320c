"""Explanations as one page for a browser, which needs nothing from elsewhere and shows all without JavaScript."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import PurePath

from mergefs import __version__
from mergefs.reports.colours import BOUGHT_DARK, BOUGHT_LIGHT, ERROR_DARK, ERROR_LIGHT, STEPS, Scale, step
from mergefs.reports.explanation import ExpertReport, Explanation
from mergefs.reports.heatmap import NO_LAYER, Panel, short_ends
from mergefs.reports.spending import Amount, Spending
from mergefs.reports.wording import EQUAL, bought, details, error, percent
from mergefs.units import format_size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing, whatever a name in a recipe says."""

_MAPS: tuple[tuple[str, str, str, Callable[[Amount], str], Callable[[Amount], float | None]], ...] = (
    ("b", "bytes bought", "of the expert's bytes", bought, lambda amount: amount.bought),
    ("e", "error left", "of the expert's delta", error, lambda amount: amount.error),
)
"""Of each heat map: the class of its cells, its title, what its percentages are of, and how to show a cell."""


def render(explanation: Explanation) -> str:
    """Return the page as HTML."""
    name = PurePath(explanation.facts["recipe"]).name
    sections = [_summary(explanation), *map(_expert, explanation.experts)]
    if explanation.reading is not None:
        sections.append(_reading(explanation))
    sections.append(_tensors(explanation))
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(name)}: where the bytes go</title>",
            f"<style>\n{_asset('page.css')}{_colours()}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>{escape(name)}</h1><p>Where the bytes of the experts go, and what is left out.</p></header>",
            _facts(explanation),
            *sections,
            f"</main>\n<footer>{_meaning()}<p>mergefs {escape(__version__)}</p></footer>",
            f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n",
        )
    )


@cache
def _asset(name: str) -> str:
    return files("mergefs.reports").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Return the rules that colour cells by their step, on a light and on a dark page."""
    light = _rules("b", BOUGHT_LIGHT) + _rules("e", ERROR_LIGHT)
    dark = _rules("b", BOUGHT_DARK) + _rules("e", ERROR_DARK)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _rules(letter: str, scale: Scale) -> str:
    return "".join(
        f".{letter}{number} {{ background: {scale.colour(number)}; color: {scale.ink(number)}; }}\n"
        for number in range(STEPS)
    )


def _facts(explanation: Explanation) -> str:
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in explanation.facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in explanation.notes)
    return f'<dl class="facts">{rows}</dl>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, name: str = "") -> str:
    """Return a table of cells that are HTML; all columns but the first ``left`` are numbers."""
    kinds = ["" if index < left else ' class="n"' for index in range(len(head))]
    titles = "".join(f'<th scope="col"{kind}>{escape(title)}</th>' for title, kind in zip(head, kinds, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="list{name}"><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sized(size: int) -> str:
    """Return a size for people, with the number of bytes that it is sorted by."""
    return f'<data value="{size}">{format_size(size)}</data>'


def _share(share: float | None, letter: str = "b") -> str:
    """Return a share as a number, with a bar beside it in the colour of its heat map."""
    if share is None:
        return '<data value="-1">?</data>'
    bar = f'<span class="bar bar-{letter}" style="--part:{min(share, 1):.4f}"></span>'
    return f'<data value="{share:.6f}">{percent(share)} %</data> {bar}'


def _summary(explanation: Explanation) -> str:
    """Return the table of experts."""
    rows = [
        (
            f'<span title="{escape(expert.reference)}">{escape(expert.label)}</span>',
            _sized(expert.amount.total),
            _sized(expert.amount.planned),
            _share(expert.amount.bought),
            _sized(expert.amount.free),
            _share(expert.amount.error, "e"),
        )
        for expert in explanation.experts
    ]
    head = ("expert", "size", "bought", "share bought", "free", "error left")
    return f"<section><h2>Experts</h2>{_table(head, rows)}</section>"


def _expert(expert: ExpertReport) -> str:
    """Return the heat maps of one expert, one beside the other where there is room."""
    figures = []
    for letter, title, whole, show, share in _MAPS:
        tables = "".join(_heat_map(panel, letter, show, share) for panel in expert.panels())
        figures.append(
            f"<figure><figcaption>{title} <small>% {whole}</small> {_legend(letter)}</figcaption>{tables}</figure>"
        )
    return f'<section><h2>{escape(expert.label)}</h2><div class="maps">{"".join(figures)}</div></section>'


def _legend(letter: str) -> str:
    """Return the scale of a heat map."""
    steps = "".join(f'<i class="{letter}{number}"></i>' for number in range(STEPS))
    return f'<span class="legend" aria-hidden="true">0 {steps} 100</span>'


def _heat_map(panel: Panel, letter: str, show: Callable[[Amount], str], share: Callable[[Amount], float | None]) -> str:
    """Return one heat map as a table."""
    labels = short_ends(panel.kinds, ".")
    titles = "".join(
        f'<th scope="col" title="{escape(kind)}"><span>{_breakable(label)}</span></th>'
        for kind, label in zip(panel.kinds, labels, strict=True)
    )
    corner = "" if panel.title == NO_LAYER else "layer"
    rows = []
    for name, cells in zip(panel.rows, panel.cells, strict=True):
        shown = "".join(
            _cell(f"{_place(panel, name)}{kind}", cell, letter, show, share)
            for kind, cell in zip(panel.kinds, cells, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    return (
        f'<div class="wide"><table class="map"><caption>{escape(panel.title)}</caption>'
        f"<thead><tr><th>{corner}</th>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _breakable(label: str) -> str:
    """Return a name that may go on in another line after each of its words."""
    return escape(label).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _place(panel: Panel, row: str) -> str:
    return "" if panel.title == NO_LAYER else f"{panel.title}.{row}."


def _cell(
    name: str,
    amount: Amount | None,
    letter: str,
    show: Callable[[Amount], str],
    share: Callable[[Amount], float | None],
) -> str:
    """Return one cell, which tells all of itself to who points at it."""
    if amount is None:
        return '<td class="none"></td>'
    text, part = show(amount), share(amount)
    kind = "same" if text == EQUAL or part is None else f"{letter}{step(part)}"
    return f'<td class="{kind}" title="{escape(f"{name}: {details(amount)}")}">{escape(text)}</td>'


def _reading(explanation: Explanation) -> str:
    """Return what was planned beside what was really read."""
    reading = explanation.reading
    if reading is None:
        return ""
    rows: list[Sequence[str]] = []
    for expert in explanation.experts:
        for kind, amount in [("all", expert.amount), *expert.by_kind().items()]:
            read = amount.read or 0
            part = _share(read / amount.planned) if amount.planned else '<data value="-1">-</data>'
            rows.append((escape(expert.label), escape(kind), _sized(amount.planned), _sized(read), part))
    head = ("expert", "kind of tensor", "planned", "really read", "of the plan")
    return (
        f"<section><h2>Planned and really read</h2><p>By {escape(reading.how)}, until {escape(reading.when)}; "
        f"{format_size(reading.again)} more were read again, since a cache had dropped them.</p>"
        f"{_table(head, rows, left=2, name=' sortable')}</section>"
    )


def _tensors(explanation: Explanation) -> str:
    """Return the table of all tensors, those with the largest error first."""
    entries = [(expert, entry) for expert in explanation.experts for entry in expert.spendings]
    whole = sum(entry.amount.left or 0.0 for _, entry in entries)

    def part(entry: Spending) -> float:
        return (entry.amount.left or 0.0) / whole if whole else 0.0

    rows = [
        (
            f"<code>{escape(entry.tensor)}</code>",
            escape(expert.label),
            _sized(entry.amount.total),
            _share(entry.amount.bought),
            _share(entry.amount.error, "e"),
            f'<data value="{part(entry):.9f}">{100 * part(entry):.2f} %</data>',
        )
        for expert, entry in sorted(entries, key=lambda pair: -part(pair[1]))
    ]
    head = ("tensor", "expert", "size", "share bought", "error left", "part of all error")
    table = _table(head, rows, left=2, name=" sortable")
    return f"<section><details><summary>All tensors ({len(rows)})</summary>{table}</details></section>"


def _meaning() -> str:
    """Return how the numbers are to be read."""
    return (
        f"<p>Shares are percent of the bytes that the whole merge reads. <b>{EQUAL}</b> marks what need not be read, "
        "since the base or another expert has the same bytes. <b>Error left</b> is the norm of what is left out of an "
        "expert's delta, relative to the norm of the delta: 0 where everything is there, 100 where nothing is. Errors "
        "of several experts add up as squares, as far as their deltas have nothing in common.</p>"
    )
