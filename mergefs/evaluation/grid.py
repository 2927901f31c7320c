"""A grid of variants of one recipe, and what came of it as a table and a picture."""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mergefs.errors import MissingDependencyError, UsageError
from mergefs.evaluation.comparison import Measured

_MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Axis:
    """One key and the values that it has in the grid."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant, its value of each key, and what was measured of it."""

    values: tuple[str, ...]
    measured: Measured


def parse_axes(settings: Sequence[str]) -> tuple[Axis, ...]:
    """Return the axes that ``KEY=VALUE,VALUE...`` describe.

    Raises UsageError for what is not of that form, and for a key that is given twice.
    """
    axes: list[Axis] = []
    for setting in settings:
        key, equals, listed = setting.partition("=")
        values = listed.split(",")
        if not key or not equals or not all(values):
            raise UsageError(f"--set {setting!r} is not of the form KEY=VALUE,VALUE; write density=0.2,0.4,0.6")
        if any(axis.key == key for axis in axes):
            raise UsageError(f"--set {key} is given twice; list all of its values in one")
        axes.append(Axis(key, tuple(dict.fromkeys(values))))
    return tuple(axes)


def combinations(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return every combination of values, the last key changing fastest."""
    return list(itertools.product(*(axis.values for axis in axes)))


def variant_text(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """Return a combination as the text of a variant."""
    return ",".join(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))


def table(axes: Sequence[Axis], cells: Sequence[Cell]) -> bytes:
    """Return the grid as CSV, with a line for each variant and a head."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    head = ["perplexity", "predicted_relative_error", "expert_bytes_read", "tokens", "plan_id"]
    writer.writerow([*(axis.key for axis in axes), *head])
    for cell in cells:
        found = cell.measured
        numbers = (found.perplexity, found.predicted_relative_error, found.expert_bytes_read, found.tokens)
        writer.writerow([*cell.values, *numbers, found.plan_id])
    return text.getvalue().encode()


def can_draw() -> bool:
    """Return whether there is matplotlib, without which there is no picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def require_drawing() -> None:
    """Raise MissingDependencyError without matplotlib."""
    if not can_draw():
        raise MissingDependencyError(
            "drawing needs matplotlib, which is not installed; install it with `pip install 'mergefs[plots]'`"
        )


def draw(axes: Sequence[Axis], cells: Sequence[Cell], title: str, kind: str) -> bytes:
    """Return a picture as a file of ``kind``: perplexity over the values of the last key, a line for each of the rest.

    Raises MissingDependencyError without matplotlib.
    """
    require_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    places = {value: place for place, value in enumerate(axes[-1].values)}
    for number, others in enumerate(combinations(axes[:-1])):
        line = [cell for cell in cells if cell.values[:-1] == others]
        plot.plot(
            [places[cell.values[-1]] for cell in line],
            [cell.measured.perplexity for cell in line],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.6,
            label=variant_text(axes[:-1], others),
        )
    plot.set_xticks(list(places.values()), list(places))
    plot.set_xlabel(axes[-1].key)
    plot.set_ylabel("perplexity (lower is better)")
    plot.set_title(title, fontsize=11, loc="left")
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    if len(axes) > 1:
        plot.legend(fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind)
    return drawn.getvalue()
