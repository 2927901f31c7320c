"""``mergefs log``."""

from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergefs.materialize.lineage import Lineage, Run


@click.command(name="log")
@click.argument("target", metavar="[DIR|PLAN|RUN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, target: str | None, as_json: bool) -> None:
    """Show what a model was made of, as a tree; without an argument, every run of `mergefs materialize`.

    DIR is a model that mergefs has written or shows, also one that was moved; PLAN and RUN are ids, or how they begin.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_table
    from mergefs.materialize.lineage import lineage, runs

    with Catalog(settings.catalog or default_location()) as catalog:
        found = None if target is None else lineage(target, catalog)
        listed = runs(catalog) if found is None else []
    if as_json:
        print_json([asdict(one) for one in listed] if found is None else asdict(found))
    elif found is not None:
        for line in _tree(found):
            click.echo(line)
    elif listed:
        rows = [(one.transaction_id, _time(one), one.state, one.plan_id, one.destination) for one in listed]
        print_table(("run", "at (UTC)", "state", "plan", "model"), rows)
    else:
        click.echo("no model has been written by `mergefs materialize`")


def _tree(node: "Lineage", before: str = "", below: str = "") -> "Iterator[str]":
    """Yield the lines of a node and of what it was made of, indented."""
    facts = [
        node.role,
        f"plan {node.plan_id}" if node.plan_id else "",
        node.method,
        f"contents {node.identity}" if _tells_contents(node) else "",
    ]
    yield f"{before}{node.name}  ({', '.join(filter(None, facts))})"
    for run in node.runs:
        beside = below + ("│ " if node.inputs else "  ")
        yield f"{beside}{run.state} {_time(run)} UTC: {run.destination}, run {run.transaction_id}"
    for index, one in enumerate(node.inputs, start=1):
        last = index == len(node.inputs)
        yield from _tree(one, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _tells_contents(node: "Lineage") -> bool:
    """Return whether the identity of a node is that of its contents, and not told by its plan already."""
    return bool(node.identity) and not node.identity.startswith("local-") and node.identity != node.plan_id


def _time(run: "Run") -> str:
    """Return when the state of a run was written, in universal time."""
    return datetime.fromtimestamp(run.changed_ns / 1e9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
