"""``mergefs materialize``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import (
    MERGEKIT_EPILOG,
    PlanArguments,
    memory_option,
    multi_arguments,
    plan_arguments,
    verify_reads_option,
)
from mergefs.cli.settings import Settings, absolute
from mergefs.errors import MaterializeError

if TYPE_CHECKING:
    from mergefs.materialize.materialize import Materialized, Order
    from mergefs.planner.plan import MergePlan


@click.command(name="materialize", epilog=MERGEKIT_EPILOG)
@click.argument("paths", metavar="RECIPE... OUT", nargs=-1, required=True, type=click.Path(path_type=Path))
@plan_arguments
@multi_arguments
@click.option("--out-path", metavar="OUT", type=click.Path(path_type=Path), hidden=True)
@click.option("--overwrite", is_flag=True, help="Replace a model that is there, in one step.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run has left, as far as hashes prove it.")
@click.option("--fresh", is_flag=True, help="Throw away what an interrupted run has left.")
@memory_option
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that compute at a time.  [default: processors + 1, or 1]",
)
@verify_reads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    paths: tuple[Path, ...],
    arguments: PlanArguments,
    out_path: Path | None,
    overwrite: bool,
    resume: bool,
    fresh: bool,
    memory: int,
    threads: int | None,
    verify_reads: bool,
    as_json: bool,
) -> None:
    """Write merged models to disk, each all or nothing.

    One RECIPE is written to OUT itself; several, or a directory of recipes, to a directory each below OUT, all at the
    same time: what they have in common is read once. RECIPE@CHANGES is a variant. The bytes are those that a mount of
    the same recipe shows. Models that have not been analysed are hashed as they are read, so
    that the result can be told by its hash on any machine; --no-verify-reads leaves that out.
    """
    from mergefs.mount.recipe_files import expand_recipes, unique_names

    if resume and fresh:
        raise click.UsageError("--resume goes on with what --fresh throws away; give one of them")
    how = _How(overwrite, resume, fresh, memory, threads, verify_reads)
    recipes, out = (paths, out_path) if out_path is not None else (paths[:-1], paths[-1])
    if not recipes:
        raise click.UsageError(f"there is no OUT beside {paths[0]}; name the directory to write the model to")
    files = expand_recipes(recipes)
    single = len(recipes) == 1 and not recipes[0].is_dir()
    destinations = [absolute(out) if single else absolute(out) / name for name in unique_names(files)]
    _report(settings, _materialize(settings, files, destinations, arguments, how), as_json)


@dataclass(frozen=True, slots=True)
class _How:
    """What the command line says of the writing itself."""

    overwrite: bool
    resume: bool
    fresh: bool
    memory: int
    threads: int | None
    verify_reads: bool


def _materialize(
    settings: Settings, recipes: Sequence[Path], destinations: Sequence[Path], arguments: PlanArguments, how: _How
) -> list[tuple["Order", "Materialized | Exception"]]:
    """Write one model for each recipe."""
    from mergefs.allocator import keep_freed_memory, limit_arenas, made_to_stay
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.progress import progress
    from mergefs.cli.signals import ended_by_signals
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.materialize import Interrupted, Order, default_threads, materialize_together
    from mergefs.materialize.memory import UNUSED, Memory
    from mergefs.planner.targets import plan_target

    limit_arenas()
    keep_freed_memory(UNUSED // 2)
    threads = how.threads or default_threads()
    memory = Memory.of(how.memory, threads)
    catalog = Catalog(settings.catalog or default_location())
    workspace = Workspace.create(catalog, memory.cache, how.verify_reads, memory.held, how.memory)
    interrupted = Interrupted.RESUME if how.resume else Interrupted.DISCARD if how.fresh else Interrupted.REFUSE
    try:
        with ended_by_signals(), progress(settings.quiet) as listener:
            with made_to_stay():
                plans = [plan_target(recipe, arguments.options(), workspace, listener) for recipe in recipes]
            orders = [Order(plan, destination) for plan, destination in zip(plans, destinations, strict=True)]
            results = materialize_together(orders, workspace, how.overwrite, listener, interrupted, threads)
    except MaterializeError:
        raise  # which says itself how to go on
    except BaseException:
        for destination in destinations:
            _tell_of_unfinished(destination)
        raise
    finally:
        workspace.close()
    return list(zip(orders, results, strict=True))


def _report(settings: Settings, results: list[tuple["Order", "Materialized | Exception"]], as_json: bool) -> None:
    """Print what was written. Raises the first error, when all else is said."""
    from mergefs.cli.output import print_json, print_note

    errors: list[Exception] = []
    for order, result in results:
        if isinstance(result, Exception):
            errors.append(result)
            if not isinstance(result, MaterializeError):  # which says itself how to go on
                _tell_of_unfinished(order.destination)
        elif as_json:
            print_json({**asdict(result), **asdict(result.totals), "directory": str(result.directory)})
        elif not settings.quiet:
            _print(order.plan, result)
    for error in errors[1:]:
        print_note(f"another model was not written either: {error}")
    if errors:
        raise errors[0]


def _tell_of_unfinished(destination: Path) -> None:
    """Say what is kept of a run that was interrupted."""
    from mergefs.cli.output import print_note
    from mergefs.materialize.staging import Staging, staging_path
    from mergefs.materialize.transaction import describe, unfinished

    stage = Staging(staging_path(destination), destination)
    journal = unfinished(stage)
    if journal is not None:
        print_note(f"{describe(journal)} of {destination} is kept in {stage.path}; go on with --resume, or use --fresh")


def _print(plan: "MergePlan", result: "Materialized") -> None:
    """Print what was written and what it cost, for people."""
    from mergefs.cli.output import print_pairs
    from mergefs.units import format_size

    if result.already_there:
        click.echo(f"{result.directory}: is complete already, and as it was written: manifest {result.manifest}")
        return
    reused = f", {format_size(result.reused_bytes)} of it from an interrupted run" if result.reused_bytes else ""
    shared = {"shared": f"{format_size(result.shared_bytes)} with the sources, not written again"}
    print_pairs(
        {
            "wrote": str(result.directory),
            "plan": result.plan_id,
            "manifest": result.manifest,
            "size": f"{format_size(result.bytes_written)} in {result.files} files, {result.seconds:.1f} s{reused}",
            **(shared if result.shared_bytes else {}),
            "experts read": f"{format_size(result.totals.expert_bytes_read)} of "
            f"{format_size(plan.outcome.expert_bytes_total)}",
            "base read": format_size(result.totals.base_bytes_read),
            "analysis read": format_size(result.totals.analysis_bytes_read),
        }
    )
    for note in plan.notes:
        click.echo(f"note: {note}")
