"""``mergefs catalog``."""

import time
from typing import TYPE_CHECKING

import click

from mergefs.cli.catalog_check import command as check
from mergefs.cli.catalog_gc import command as gc
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.catalog.records import PlanRecord


@click.group(name="catalog")
def command() -> None:
    """Look into the catalog: the statistics, plans and transactions that mergefs keeps."""


@command.command(name="info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def info(settings: Settings, as_json: bool) -> None:
    """Show where the catalog is, how large, and what it holds."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_pairs, print_table
    from mergefs.units import format_size

    with Catalog(settings.catalog or default_location()) as catalog:
        counts = catalog.counts()
        size = catalog.size_on_disk()
        space = catalog.space()
        models = catalog.checkpoints()
        path = catalog.path
    if as_json:
        print_json(
            {
                "path": str(path),
                "size_bytes": size,
                "records": counts,
                "bytes": space,
                "models": [
                    {"path": m.path, "tensors": m.tensors, "total_bytes": m.total_bytes, "content": m.content}
                    for m in models
                ],
            }
        )
        return
    print_pairs({"catalog": str(path), "size": format_size(size)})
    kinds = dict.fromkeys((*counts, *(kind for kind, taken in space.items() if taken)))
    tables = [(kind, str(counts.get(kind, "")), format_size(space[kind])) for kind in kinds]
    print_table(("table", "records", "size"), tables, numeric=(1, 2))
    if models:
        rows = [(m.path, str(m.tensors), format_size(m.total_bytes), m.content or "not analysed") for m in models]
        print_table(("model", "tensors", "size", "identity"), rows, numeric=(1, 2))


@command.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def list_plans(settings: Settings, as_json: bool) -> None:
    """List the plans, the newest first: each can be mounted, written and explained by its id."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_table

    with Catalog(settings.catalog or default_location()) as catalog:
        plans = sorted(catalog.plans(), key=lambda plan: plan.created_ns, reverse=True)
    if as_json:
        print_json([_plan_json(plan) for plan in plans])
    elif plans:
        columns = ("plan", "recipe", "method", "bytes of experts", "age", "predicted error")
        print_table(columns, [_plan_row(plan) for plan in plans], numeric=(3, 4, 5))
    else:
        click.echo("The catalog has no plans.")


def _plan_json(plan: "PlanRecord") -> dict[str, object]:
    """Return one plan for programs."""
    return {
        "plan_id": plan.plan_id,
        "recipe": plan.origin,
        "method": plan.method,
        "budget_bytes": plan.budget_bytes,
        "expert_bytes_total": plan.expert_bytes_total,
        "expert_bytes_planned": plan.expert_bytes_planned,
        "created_ns": plan.created_ns,
        "predicted_relative_error": plan.outcome.get("predicted_relative_error"),
    }


def _plan_row(plan: "PlanRecord") -> tuple[str, ...]:
    """Return one plan for people."""
    from mergefs.units import format_duration, format_size

    share = plan.expert_bytes_planned / plan.expert_bytes_total if plan.expert_bytes_total else 1.0
    error = plan.outcome.get("predicted_relative_error")
    return (
        plan.plan_id,
        plan.origin,
        plan.method,
        f"{format_size(plan.expert_bytes_planned)} ({share:.0%})",
        format_duration(max(0, time.time_ns() - plan.created_ns) / 1e9),
        "-" if error is None else f"{error:.4f}",
    )


command.add_command(check)
command.add_command(gc)
