"""``mergefs diff``."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.comparison.compare import Comparison, TensorDistance
    from mergefs.comparison.sides import Side
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.options import PlanOptions
    from mergefs.progress import Progress

_SHOWN = 20
"""Tensors that people are shown, and names in a list, unless they ask for another number."""


@click.command(name="diff")
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Show the N most distant tensors.  [default: {_SHOWN}, with --json all]",
)
@click.option("--budget", metavar="BUDGET", help="Compare what A is within this budget, where A is a recipe.")
@click.option("--base", metavar="MODEL", help="Model that stands in for what the budget leaves out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    first: Path,
    second: Path,
    limit: int | None,
    budget: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Show how far two models are from each other, tensor by tensor, the most distant first.

    A and B are recipes, ids of plans, or model directories (a mount is one). Nothing is written: merged tensors are
    computed block by block, and those that the catalog knows to be equal are not read. The distance of a tensor is
    ||a-b|| / ||b||.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.comparison.compare import compare
    from mergefs.engine.resources import SMALLEST_CACHE_SIZE
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.options import PlanOptions

    workspace = Workspace.create(Catalog(settings.catalog or default_location()), SMALLEST_CACHE_SIZE)
    try:
        with progress(settings.quiet) as listener:
            a = _side(first, PlanOptions(budget=budget, base=base), workspace, listener)
            b = _side(second, PlanOptions(), workspace, listener)
            comparison = compare(a, b, workspace.reader, listener)
    finally:
        workspace.close()
    if as_json:
        print_json(_json(a, b, comparison, limit))
    else:
        _print(a, b, comparison, limit or _SHOWN)


def _side(target: Path, options: "PlanOptions", workspace: "Workspace", listener: "Progress") -> "Side":
    """Open one of the two."""
    from mergefs.comparison.sides import directory_side, plan_side
    from mergefs.errors import UsageError
    from mergefs.planner.targets import plan_target

    if os.path.isdir(target):  # noqa: PTH112 - is_dir() raises where access is denied
        if options.budget is not None:
            raise UsageError(f"--budget is for recipes, and {target} is a model directory; leave it out")
        return directory_side(target, workspace.catalog)
    return plan_side(plan_target(target, options, workspace, listener), workspace)


def _json(a: "Side", b: "Side", comparison: "Comparison", limit: int | None) -> dict[str, object]:
    """Return the comparison for programs; numbers that JSON does not have are null."""
    return {
        "a": {"title": a.title, "kind": a.kind, "plan_id": a.plan_id},
        "b": {"title": b.title, "kind": b.kind, "plan_id": b.plan_id},
        "same": comparison.same,
        "relative_distance": _number(comparison.relative),
        "distance": _number(comparison.distance),
        "norm": _number(comparison.norm),
        "tensors_compared": len(comparison.tensors),
        "tensors_differing": len(comparison.differing),
        "tensors_read": sum(tensor.read for tensor in comparison.tensors),
        "tensors": [
            {
                "name": tensor.name,
                "relative_distance": _number(tensor.relative),
                "distance": _number(tensor.distance),
                "norm": _number(tensor.norm),
                "shape": list(tensor.shape),
                "dtype_a": tensor.dtype_a,
                "dtype_b": tensor.dtype_b,
                "read": tensor.read,
            }
            for tensor in comparison.tensors[:limit]
        ],
        "mismatches": [
            {
                "name": entry.name,
                "shape_a": list(entry.shape_a),
                "shape_b": list(entry.shape_b),
                "dtype_a": entry.dtype_a,
                "dtype_b": entry.dtype_b,
            }
            for entry in comparison.mismatches
        ],
        "only_a": list(comparison.only_a),
        "only_b": list(comparison.only_b),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _print(a: "Side", b: "Side", comparison: "Comparison", limit: int) -> None:
    """Print the comparison for people."""
    from mergefs.cli.output import print_pairs, print_table

    print_pairs({"A": a.title, "B": b.title, "distance": _overall(comparison)})
    shown = comparison.differing[:limit]
    if shown:
        rows = [_row(tensor) for tensor in shown]
        print_table(("tensor", "||a-b|| / ||b||", "||a-b||", "shape", "dtype"), rows, numeric=(1, 2))
    left = len(comparison.differing) - len(shown)
    if left:
        click.echo(f"and {left} more that differ; --limit {len(comparison.differing)} shows them all")
    equal = len(comparison.tensors) - len(comparison.differing)
    if equal:
        unread = sum(not tensor.read for tensor in comparison.tensors)
        known = f", {unread} of them known to be without being read" if unread else ""
        click.echo(f"{equal} of {len(comparison.tensors)} tensors are equal{known}")
    for entry in comparison.mismatches:
        sides = [f"{list(entry.shape_a)} {entry.dtype_a}", f"{list(entry.shape_b)} {entry.dtype_b}"]
        click.echo(f"not compared: {entry.name} is {sides[0]} in A and {sides[1]} in B")
    for which, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            click.echo(f"only in {which}: {', '.join(names[:limit])}{more}")


def _overall(comparison: "Comparison") -> str:
    """Return the sentence that sums all up."""
    if comparison.same:
        return "0: both have the same tensors with the same elements"
    differing = len(comparison.differing)
    if not differing:
        return "0 over the tensors that were compared"
    tensors = "the tensor that differs" if differing == 1 else f"the {differing} tensors that differ"
    return f"{_shown(comparison.relative)} = ||A-B|| / ||B|| over {tensors}"


def _row(tensor: "TensorDistance") -> tuple[str, ...]:
    dtype = tensor.dtype_b if tensor.dtype_a == tensor.dtype_b else f"{tensor.dtype_a} in A, {tensor.dtype_b} in B"
    return (tensor.name, _shown(tensor.relative), _shown(tensor.distance), _shape(tensor.shape), dtype)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _shown(value: Any) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
