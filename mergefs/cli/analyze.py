"""``mergefs analyze``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.engine.workspace import Workspace
    from mergefs.progress import Progress


@click.command(name="analyze")
@click.argument("targets", metavar="RECIPE_OR_MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Model to compare the experts with, where a recipe has no base.")
@click.option(
    "--planes",
    metavar="N",
    type=click.IntRange(1, 8),
    help="Also keep the deltas of a recipe's experts in N planes (1 to 8), each a sixteenth of their 16 bit weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings, targets: tuple[Path, ...], base: str | None, planes: int | None, as_json: bool
) -> None:
    """Read models once and keep what budgets and methods need to know of them.

    A recipe has its models hashed, the deltas of its experts measured, and the statistics of its method gathered. A
    model directory, or an adapter's, is hashed. What the catalog knows already is not read again.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_table
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.units import format_size

    identities: dict[str, str] = {}
    workspace = Workspace.create(Catalog(settings.catalog or default_location()))
    try:
        with progress() as listener:
            for target in targets:
                identities |= _analyze(target, base, workspace, listener)
    finally:
        workspace.close()
    read = workspace.ledger.totals().analysis_bytes_read
    if as_json:
        models = [{"path": path, "identity": identity} for path, identity in identities.items()]
        print_json({"models": models, "analysis_bytes_read": read})
        return
    print_table(("model", "identity"), list(identities.items()))
    click.echo(f"read {format_size(read)}" if read else "everything was known already")


def _analyze(target: Path, base: str | None, workspace: "Workspace", listener: "Progress") -> dict[str, str]:
    """Analyse one target and return the identities of its models by path."""
    from mergefs.checkpoint import open_checkpoint
    from mergefs.checkpoint.adapter import is_adapter, open_adapter
    from mergefs.checkpoint.checkpoint import WeightSource
    from mergefs.planner.analysis import analyze_family, record_checkpoints
    from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan
    from mergefs.recipe.model import load_recipe
    from mergefs.statistics.identity import checkpoint_identity

    catalog = workspace.catalog
    sources: tuple[WeightSource, ...]
    if not os.path.isdir(target):  # noqa: PTH112 - is_dir() raises where access is denied
        draft = draft_plan(load_recipe(target), PlanOptions(base=base), workspace)
        analyze_draft(draft, workspace, listener)
        sources = draft.sources
    else:
        sources = (open_adapter(target) if is_adapter(target) else open_checkpoint(target),)
        analyze_family((), sources, catalog, workspace.reader, listener)
    record_checkpoints(sources, catalog)
    return {str(entry.path): checkpoint_identity(entry, catalog) for entry in sources}
