"""The curves: relative error by budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from budget_study.results import FamilyFigures, MethodFigures
from budget_study.study import STRATEGIES

_COLOURS: Final = {"coin": "#9a9a9a", "norm": "#d08a2c", "planner": "#2b7bba", "planes": "#1b8a5a"}
_MARKERS: Final = {"coin": "x", "norm": "^", "planner": "s", "planes": "o"}
_LOWEST: Final = 2e-3
"""Where the axis of errors ends: below, what is left is no more than rounding."""


def draw_all(families: Sequence[FamilyFigures], budgets: Sequence[str], path: Path) -> None:
    """Draw a panel for every method on every family."""
    methods = len(families[0].methods)
    figure, panels = _panels(len(families), methods, (3.0 * methods, 2.9 * len(families)))
    for row, family in zip(panels, families, strict=True):
        for axes, method in zip(row, family.methods, strict=True):
            _draw(axes, method, budgets)
            axes.set_title(f"{method.merge.method}, {family.family.kind.name}", fontsize=9)
    _finish(figure, panels, path)


def draw_one(family: FamilyFigures, budgets: Sequence[str], path: Path) -> None:
    """Draw error and perplexity of the first method, side by side."""
    method = family.methods[0]
    figure, panels = _panels(1, 2, (8.0, 3.2))
    _draw(panels[0][0], method, budgets)
    axes = panels[0][1]
    shares = _shares(budgets)
    for strategy in STRATEGIES:
        values = [entry.perplexity for entry in method.strategies[strategy.name]]
        axes.plot([0, *shares], [family.base_perplexity, *values], **_style(strategy.name), label=strategy.title)
    axes.axhline(method.whole_perplexity, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("everything read", (shares[-1], method.whole_perplexity), fontsize=7, ha="right", va="bottom")
    axes.set_xlabel("expert bytes read, %", fontsize=8)
    axes.set_ylabel("held-out perplexity", fontsize=8)
    axes.tick_params(labelsize=7)
    _finish(figure, panels, path)


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw(axes: Any, method: MethodFigures, budgets: Sequence[str]) -> None:
    """Draw the errors of one method, and the bound."""
    shares = _shares(budgets)
    for strategy in STRATEGIES:
        errors = [entry.error for entry in method.strategies[strategy.name]]
        axes.plot(shares, errors, **_style(strategy.name), label=strategy.title)
    axes.plot(shares, method.bounds, color="black", linewidth=0.9, linestyle="--", label="Shannon bound")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST, 1.3)
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("expert bytes read, %", fontsize=8)
    axes.set_ylabel("relative error", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _style(name: str) -> dict[str, Any]:
    return {"color": _COLOURS[name], "marker": _MARKERS[name], "markersize": 4, "linewidth": 1.3}


def _shares(budgets: Sequence[str]) -> list[float]:
    return [float(budget.removesuffix("%")) for budget in budgets]


def _finish(figure: Any, panels: Any, path: Path) -> None:
    """Put one legend below all panels and write the picture."""
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version of the library in the file: the same figures are the same bytes.
    figure.savefig(path, metadata={"Software": None})
