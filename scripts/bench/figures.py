"""The pictures of the page: mergefs beside mergekit, time by budget, and rates of reading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.recipes import METHODS
from bench.results import Results
from bench.rows.budgets import budgets_name
from bench.rows.catalogue import counts_of
from bench.rows.mounts import ENGINE, PATTERNS, again, file, first, mount_name
from bench.rows.peers import COLD, COPYING, MERGEKIT, WARM, name_of
from bench.setting import Setting, named

_COLOURS: Final = {MERGEKIT: "#9a9a9a", COLD: "#2b7bba", WARM: "#1b8a5a", COPYING: "#d08a2c"}


def draw_all(setting: Setting, results: Results, directory: Path) -> dict[str, str]:
    """Draw what has been measured; return the file names of the pictures by what they show."""
    drawn = {
        "peers": _peers(setting, results, directory / "bench-peers.png"),
        "budgets": _budgets(setting, results, directory / "bench-budgets.png"),
        "mounts": _mounts(setting, results, directory / "bench-mounts.png"),
    }
    return {what: f"{directory.name}/{path.name}" for what, path in drawn.items() if path is not None}


def _peers(setting: Setting, results: Results, path: Path) -> Path | None:
    """Draw the seconds of each program for each method, in a panel for each size; a logarithmic scale."""
    panels = []
    for size in dict.fromkeys((setting.large, setting.small)):
        bars = []
        for method in METHODS.values():
            for count in sorted({*counts_of(setting, method), setting.extent.main}):
                name = name_of(method.name, count, size)
                checked = results.checked(name)
                if checked is not None and checked.same:
                    bars.append((f"{method.name}, {count}", name))
        if bars:
            panels.append((named(size), bars))
    if not panels:
        return None
    figure, axes = _panels(len(panels), (4.4 * len(panels), 0.9 + 0.32 * max(len(bars) for _, bars in panels)))
    for panel, (title, bars) in zip(axes, panels, strict=True):
        for number, way in enumerate((MERGEKIT, COLD, WARM, COPYING)):
            values = [results.median(name, way) or 0.0 for _, name in bars]
            places = [index + 0.2 * (number - 1.5) for index in range(len(bars))]
            panel.barh(places, values, height=0.2, color=_COLOURS[way], label=way)
        panel.set_yticks(range(len(bars)), [label for label, _ in bars])
        panel.invert_yaxis()
        panel.set_xscale("log")
        _label(panel, f"models of {title}", "seconds, end to end")
    return _finish(figure, axes[0], path)


def _budgets(setting: Setting, results: Results, path: Path) -> Path | None:
    """Draw time by budget, as shares of the time of everything."""
    lines = []
    for slow, label in ((True, "a source of 500 MB/s"), (False, "the disk as it is")):
        name = budgets_name(setting, slow)
        found = [(budget, results.median(name, f"{budget} %")) for budget in setting.extent.budgets]
        known = [(budget, value) for budget, value in found if value is not None]
        if len(known) > 1:
            lines.append((label, known))
    if not lines:
        return None
    figure, (panel,) = _panels(1, (4.4, 3.0))
    for (label, known), colour in zip(lines, ("#2b7bba", "#1b8a5a"), strict=False):
        panel.plot(*zip(*known, strict=True), marker="o", markersize=4, linewidth=1.3, color=colour, label=label)
    panel.set_xscale("log")
    panel.set_ylim(bottom=0)
    panel.set_xticks(setting.extent.budgets, [str(budget) for budget in setting.extent.budgets])
    panel.minorticks_off()
    _label(panel, f"ties of {setting.extent.budgeted} experts, {named(setting.large)}", "expert bytes read, %")
    panel.set_ylabel("seconds", fontsize=8)
    return _finish(figure, panel, path)


def _mounts(setting: Setting, results: Results, path: Path) -> Path | None:
    """Draw the rates of reading a mount, first and again, and the file."""
    name = mount_name(setting, setting.extent.few[0])
    if results.median(name, ENGINE) is None:
        return None
    figure, (panel,) = _panels(1, (4.4, 2.6))
    series = (("first", first, "#2b7bba"), ("again", again, "#1b8a5a"), ("the file", file, "#9a9a9a"))
    for number, (label, way, colour) in enumerate(series):
        rates = [_rate(results, name, way(pattern)) for pattern in PATTERNS]
        panel.bar([index + 0.27 * (number - 1) for index in range(len(rates))], rates, 0.27, color=colour, label=label)
    engine = _rate(results, name, ENGINE)
    panel.axhline(engine, color="black", linewidth=0.8, linestyle=":")
    panel.annotate("the engine", (len(PATTERNS) - 0.6, engine), fontsize=7, ha="right", va="bottom")
    panel.set_xticks(range(len(PATTERNS)), PATTERNS)
    panel.set_yscale("log")
    _label(panel, f"reading a mount: {setting.extent.few[0]}, {named(setting.large)}", "")
    panel.set_ylabel("GB/s", fontsize=8)
    return _finish(figure, panel, path)


def _rate(results: Results, name: str, way: str) -> float:
    """Return GB/s, 0 where nothing was measured."""
    value, taken = results.median(name, way), results.taken(name, way)
    return taken[0].facts["bytes"] / value / 1e9 if value else 0.0


def _panels(count: int, size: tuple[float, float]) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _label(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _finish(figure: Any, axes: Any, path: Path) -> Path:
    """Put a legend below and write the picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version of the library in the file: the same figures are the same bytes.
    figure.savefig(path, metadata={"Software": None})
    return path
