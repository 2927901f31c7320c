"""``mergefs analyze``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import memory_option, random_seed_option, truncate_embeddings_option
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.engine.workspace import Workspace
    from mergefs.planes.analysis import PlanesWritten
    from mergefs.planner.build import PlanOptions
    from mergefs.progress import Progress


@dataclass(frozen=True, slots=True)
class _Analysed:
    """A model, and how many of its bytes were read; ``known`` are those of tensors that nothing was missing of."""

    path: str
    identity: str
    size: int
    read: int
    known: int


@click.command(name="analyze")
@click.argument("targets", metavar="RECIPE_OR_MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Model to compare the experts with, where a recipe has no base.")
@random_seed_option
@truncate_embeddings_option
@click.option(
    "--planes",
    metavar="N",
    type=click.IntRange(1, 8),
    help="Also keep the deltas of a recipe's experts in N planes (1 to 8), each a sixteenth of their 16 bit weights.",
)
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    targets: tuple[Path, ...],
    base: str | None,
    random_seed: int,
    unsafe_truncate_embeddings: bool,
    planes: int | None,
    memory: int,
    as_json: bool,
) -> None:
    """Read models once and keep what budgets and methods need to know of them.

    A recipe has its models hashed, the deltas of its experts measured, and the statistics of its method gathered. A
    model directory, or an adapter's, is hashed. What the catalog knows already is not read again. Where a method goes
    over its tensors more than once, those are read again that do not fit in the memory.

    With --planes, budgets can buy the deltas of a recipe's experts in part: a first plane of a sixteenth of the bytes
    of 16 bit weights holds the coarse of each delta, and every plane after it about halves what is still missing. They
    are kept in the catalog's directory.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_table
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.build import PlanOptions
    from mergefs.units import format_size

    models: dict[str, _Analysed] = {}
    written: dict[str, PlanesWritten] = {}
    options = PlanOptions(base=base, random_seed=random_seed, truncate_embeddings=unsafe_truncate_embeddings)
    workspace = Workspace.create(Catalog(settings.catalog or default_location()), planning_size=memory)
    try:
        with progress(settings.quiet) as listener:
            for target in targets:
                found, kept = _analyze(target, options, planes, workspace, listener)
                models |= found
                written |= kept
    finally:
        workspace.close()
    read = workspace.ledger.totals().analysis_bytes_read
    if as_json:
        listed = [
            {
                "path": model.path,
                "identity": model.identity,
                "bytes": model.size,
                "analysis_bytes_read": model.read,
                "known_bytes": model.known,
            }
            for model in models.values()
        ]
        content: dict[str, object] = {"models": listed, "analysis_bytes_read": read}
        if planes is not None:
            content["planes"] = [_as_json(expert, entry) for expert, entry in written.items()]
        print_json(content)
        return
    rows = [
        (model.path, model.identity, *map(format_size, (model.size, model.known, model.read)))
        for model in models.values()
    ]
    print_table(("model", "identity", "size", "known before", "read"), rows, numeric=range(2, 5))
    if planes is not None:
        _show_planes(written, workspace.catalog.path)
    click.echo(f"read {format_size(read)}" if read else "everything was known already")


def _as_json(expert: str, entry: "PlanesWritten") -> dict[str, object]:
    """Return what was written for an expert as JSON types."""
    return {
        "path": expert,
        "tensors_coded": entry.tensors,
        "tensors_known": entry.known,
        "tensors_equal": entry.equal,
        "bytes_written": entry.bytes_written,
        "files": [str(path) for path in entry.files],
    }


def _show_planes(written: Mapping[str, "PlanesWritten"], catalog: Path) -> None:
    """Print how many bytes of planes were written for each expert, and where they are."""
    from mergefs.cli.output import print_table
    from mergefs.planes.files import planes_directory
    from mergefs.units import format_size

    rows = [
        (expert, str(entry.tensors), str(entry.known), str(entry.equal), format_size(entry.bytes_written))
        for expert, entry in written.items()
    ]
    columns = ("expert", "tensors coded", "coded before", "the base's own", "written")
    print_table(columns, rows, numeric=range(1, len(columns)))
    click.echo(f"delta planes are in {planes_directory(catalog)}")


def _analyze(
    target: Path, options: "PlanOptions", planes: int | None, workspace: "Workspace", listener: "Progress"
) -> tuple[dict[str, _Analysed], dict[str, "PlanesWritten"]]:
    """Analyse one target and return what was done to its models and what planes were written, by path."""
    from mergefs.checkpoint import open_checkpoint
    from mergefs.checkpoint.adapter import open_adapter
    from mergefs.checkpoint.checkpoint import WeightSource
    from mergefs.checkpoint.weights import is_adapter
    from mergefs.errors import UsageError
    from mergefs.planes.analysis import analyze_planes
    from mergefs.planner.analysis import analyze_family, record_checkpoints
    from mergefs.planner.build import analyze_draft, draft_plan
    from mergefs.planner.planes import delta_tasks
    from mergefs.recipe.model import load_recipe
    from mergefs.statistics.identity import checkpoint_identity

    catalog = workspace.catalog
    sources: tuple[WeightSource, ...]
    written: dict[str, PlanesWritten] = {}
    if not os.path.isdir(target):  # noqa: PTH112 - is_dir() raises where access is denied
        draft = draft_plan(load_recipe(target), options, workspace)
        known = analyze_draft(draft, workspace, listener)
        sources = draft.sources
        if planes is not None:
            tasks = delta_tasks(draft.tensors, sources, planes)
            written = analyze_planes(tasks, catalog, workspace.reader, listener)
    elif planes is not None:
        raise UsageError(f"--planes is for recipes, and {target} is a model directory; name a recipe, or leave it out")
    else:
        sources = (open_adapter(target) if is_adapter(target) else open_checkpoint(target),)
        known = analyze_family((), sources, workspace, listener)
    record_checkpoints(sources, catalog)
    models = {
        str(entry.path): _Analysed(
            str(entry.path),
            checkpoint_identity(entry, catalog),
            entry.total_bytes,
            sum(workspace.ledger.analysed(shard.path) for shard in entry.shards),
            known[entry.path],
        )
        for entry in sources
    }
    return models, written
