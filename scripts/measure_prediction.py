#!/usr/bin/env python3
"""Measures what plans predict: 200 random pairs of a recipe and a budget, predicted against measured.

Families, recipes and budgets are those of ``tests/prediction_cases.py``: small tensors, cut into blocks of 64 elements
instead of 524,288, of which each model has about a hundred. Methods that are not linear are measured on a sample of 24
blocks, as those of large models are. Prints what came of each pair and medians, and draws a figure.

Run it with the Python of an environment that mergefs and matplotlib are installed in:
``python scripts/measure_prediction.py docs/figures/prediction.png``.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from prediction_cases import Outcome, random_outcomes  # noqa: E402

from mergefs.catalog import Catalog  # noqa: E402
from mergefs.engine.workspace import Workspace  # noqa: E402
from mergefs.planner.prediction import sampled  # noqa: E402
from mergefs.sources import blocks  # noqa: E402

BLOCK_ELEMENTS: Final = 64
KINDS: Final = {"gram": "from norms and angles (linear methods)", "sampled": "from a sample of blocks (the others)"}


@click.command()
@click.argument("figure", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--pairs", default=200, show_default=True, help="How many pairs.")
@click.option("--seed", default=4, show_default=True, help="Seed of the families, recipes and budgets.")
@click.option("--planes", default=0, show_default=True, help="Keep deltas in so many planes too, for budgets to buy.")
def main(figure: Path | None, pairs: int, seed: int, planes: int) -> None:
    """Predict and measure random budgets, and draw FIGURE."""
    blocks.BLOCK_ELEMENTS = BLOCK_ELEMENTS
    sampled.EVERYTHING_BYTES = 0
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace.create(Catalog(Path(directory) / "catalog"))
        outcomes = []
        for outcome in random_outcomes(Path(directory), workspace, pairs, seed, planes):
            outcomes.append(outcome)
            print_outcome(outcome)
        workspace.close()
    print_summary(outcomes)
    if figure is not None:
        draw(outcomes, figure)


def print_outcome(outcome: Outcome) -> None:
    """Print one line."""
    predicted = outcome.predicted
    bound = "-" if predicted.error_bound is None else f"{predicted.error_bound:.4g}"
    click.echo(
        f"{outcome.method:16} {predicted.predicted_by:8} predicted {predicted.predicted_relative_error:.5f} "
        f"measured {outcome.relative_error:.5f}; error {outcome.error:.4g}, at most {bound}"
    )


def print_summary(outcomes: Sequence[Outcome]) -> None:
    """Print how far predictions were off, and how far bounds were above what was measured."""
    for kind, meaning in KINDS.items():
        off = sorted(deviation(outcome) for outcome in chosen(outcomes, kind))
        if off:
            click.echo(
                f"{len(off)} predictions {meaning}: off by {statistics.median(off):.2%} in the median, by "
                f"{off[int(0.9 * (len(off) - 1))]:.2%} or less in nine of ten"
            )
    sample = [o for o in chosen(outcomes, "sampled") if o.predicted.predicted_standard_error is not None]
    within = [
        abs(o.predicted.predicted_relative_error - o.relative_error) <= 2 * (o.predicted.predicted_standard_error or 0)
        for o in sample
    ]
    if sample:
        click.echo(f"{statistics.mean(within):.0%} of those from a sample are within two of their standard errors")
    ratios = sorted(bound_ratio(outcome) for outcome in bounded(outcomes))
    broken = sum(ratio < 1 for ratio in ratios)
    if ratios:
        click.echo(
            f"{len(ratios)} bounds, {broken} broken; {statistics.median(ratios):.2f} times the measured error in the "
            "median"
        )


def chosen(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    """Return the outcomes that were predicted in one way, and in which something was left out."""
    return [outcome for outcome in outcomes if outcome.predicted.predicted_by == kind and outcome.relative_error > 0]


def bounded(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes with a bound, in which something was left out."""
    return [outcome for outcome in outcomes if outcome.predicted.error_bound is not None and outcome.error > 0]


def deviation(outcome: Outcome) -> float:
    """Return by which part of the measured error a prediction is off."""
    return abs(outcome.predicted.predicted_relative_error / outcome.relative_error - 1)


def bound_ratio(outcome: Outcome) -> float:
    """Return the bound divided by the measured error."""
    return (outcome.predicted.error_bound or 0.0) / outcome.error


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw predicted errors and bounds against measured errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    lowest = min((o.relative_error for o in outcomes if o.relative_error > 0), default=1e-3) / 2
    for axes, title in ((left, "predicted"), (right, "at most")):
        axes.plot([lowest, 1.5], [lowest, 1.5], color="0.7", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="measured relative error", ylabel=f"{title} (relative error)")
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
    for (kind, meaning), marker, colour in zip(KINDS.items(), "ox", ("#1f6fb4", "#d1721c"), strict=True):
        found = chosen(outcomes, kind)
        predicted = [outcome.predicted.predicted_relative_error for outcome in found]
        left.scatter([o.relative_error for o in found], predicted, s=16, marker=marker, color=colour, label=meaning)
    with_bounds = bounded(outcomes)
    right.scatter(
        [outcome.relative_error for outcome in with_bounds],
        [(outcome.predicted.error_bound or 0.0) / outcome.merged for outcome in with_bounds],
        s=16,
        color="#2d8a4e",
        label="bound that is certain",
    )
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
