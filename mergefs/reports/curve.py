"""What budgets of different sizes bring: the points of a sweep, and their picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePath
from typing import Final

from mergefs.errors import MissingDependencyError, UsageError
from mergefs.planner.plan import MergePlan

FORMATS: Final = ("png", "svg", "pdf")
"""Endings of the files that a curve can be drawn into."""


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of a sweep, as it was written, and the plan within it.

    Bytes of experts; ``error`` is the predicted error and ``bound`` what it is at most (None where nothing is certain),
    relative to the whole merged delta.
    """

    budget: str
    plan_id: str
    planned: int
    total: int
    error: float
    bound: float | None

    @property
    def share(self) -> float:
        """The planned bytes, of all that the merge reads."""
        return self.planned / self.total if self.total else 0.0


def point(budget: str, plan: MergePlan) -> Point:
    """Return the point of one plan."""
    outcome = plan.outcome
    # Where nothing is left out no norm had to be known, and nothing follows from that.
    nothing_left = outcome.error_bound == 0
    return Point(
        budget,
        plan.plan_id,
        outcome.expert_bytes_planned,
        outcome.expert_bytes_total,
        outcome.predicted_relative_error,
        0.0 if nothing_left else outcome.error_bound_relative,
    )


def format_of(path: PurePath) -> str:
    """Return the format that a file's ending asks for; UsageError where it is none."""
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise UsageError(f"{path} does not say what to draw; end its name in {', '.join('.' + f for f in FORMATS)}")
    return ending


def draw(points: Sequence[Point], title: str, kind: str) -> bytes:
    """Return the picture of a sweep as a file of ``kind``. Raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "drawing needs matplotlib, which is not installed; install it with `pip install 'mergefs[plots]'`"
        ) from error
    ordered = sorted(points, key=lambda entry: entry.share)
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = [100 * entry.share for entry in ordered]
    bounds = [(share, entry.bound) for entry, share in zip(ordered, shares, strict=True) if entry.bound is not None]
    if len(bounds) > 1:
        axes.plot(*zip(*bounds, strict=True), color="#8a949e", linestyle="--", linewidth=1.3, label="at most (certain)")
    errors = [entry.error for entry in ordered]
    axes.plot(shares, errors, marker="o", color="#1f6bb8", linewidth=1.8, label="predicted")
    for entry, share in zip(ordered, shares, strict=True):
        axes.annotate(f"{entry.error:.2g}", (share, entry.error), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set_xlabel("bytes of experts read, % of all")
    axes.set_ylabel("error, relative to the merged delta")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 1.12 * max(0.05, *errors, *(bound for _, bound in bounds)))
    if len(bounds) > 1:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = BytesIO()
    figure.savefig(drawn, format=kind)
    return drawn.getvalue()
