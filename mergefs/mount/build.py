"""From recipes on the command line to the tree that a mount shows."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mergefs.catalog import Catalog, default_location
from mergefs.engine.allocator import limit_arenas
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.engine.resources import DEFAULT_CACHE_SIZE, SMALLEST_CACHE_SIZE
from mergefs.engine.workspace import Workspace
from mergefs.errors import MergefsError, RecipeError, UsageError
from mergefs.mount.models import ModelTree, MountedModel, unique_names
from mergefs.mount.tree import Tree
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.progress import Progress, Silence
from mergefs.recipe.model import load_recipe
from mergefs.units import format_size

_LOG = logging.getLogger(__name__)
_RECORDING_INTERVAL: Final = 5.0
"""Seconds by which `mergefs explain` may be behind what a mount has read."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What ``mergefs mount`` was asked for, beside the recipes. Sizes in bytes."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    catalog: Path | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    warm: bool = False
    verify_reads: bool = True


def build_tree(recipes: tuple[Path, ...], options: BuildOptions, progress: Progress | None = None) -> ModelTree:
    """Plan every recipe and return the tree of their models.

    One recipe file becomes the root itself; a directory of recipes, or several recipes, become one directory each.
    Call it in the process that serves: the catalog does not survive a fork.
    """
    if options.cache_size < SMALLEST_CACHE_SIZE:
        raise UsageError(
            f"--cache-size {format_size(options.cache_size)} is too small for the blocks that parallel readers are in "
            f"the middle of; give at least {format_size(SMALLEST_CACHE_SIZE)}"
        )
    limit_arenas()
    files = expand_recipes(recipes)
    rooted = len(recipes) == 1 and not recipes[0].is_dir()
    resources = Workspace.create(
        Catalog(options.catalog or default_location()), options.cache_size, options.verify_reads
    )
    try:
        names = unique_names(files)
        models = [
            MountedModel(name, _model(path, options, resources, progress or Silence()))
            for path, name in zip(files, names, strict=True)
        ]
    except BaseException:
        resources.close()
        raise
    stop = threading.Event()
    helpers = [_start_recording(models, resources.catalog, stop)]
    if options.warm:
        helpers.append(_start_warming(models, stop))

    def close() -> None:
        stop.set()
        for helper in helpers:
            helper.join()
        resources.close()

    return ModelTree(models, rooted, resources, close)


def source_paths(tree: Tree) -> tuple[Path, ...]:
    """Return the model directories that ``tree`` reads from."""
    return tree.sources if isinstance(tree, ModelTree) else ()


def notes(tree: Tree) -> tuple[str, ...]:
    """Return what is worth telling of the plans that ``tree`` shows, each once."""
    models = tree.models if isinstance(tree, ModelTree) else ()
    return tuple(dict.fromkeys(note for model in models for note in model.files.plan.notes))


def expand_recipes(recipes: Sequence[Path]) -> tuple[Path, ...]:
    """Return the recipe files that are meant: those named, and those in the directories that are named."""
    files: list[Path] = []
    for path in recipes:
        try:
            found = _recipes_in(path) if path.is_dir() else (path,)
        except OSError as error:
            raise RecipeError(
                f"{path}: cannot be read ({error.strerror}); give a mergekit YAML file, or a directory of them"
            ) from None
        if not found:
            raise RecipeError(f"{path}: has no recipe; put mergekit configs ending in .yml or .yaml there")
        files += found
    return tuple(files)


def _recipes_in(directory: Path) -> tuple[Path, ...]:
    return tuple(
        sorted(entry for entry in directory.iterdir() if entry.suffix in (".yml", ".yaml") and entry.is_file())
    )


def _model(path: Path, options: BuildOptions, resources: Workspace, progress: Progress) -> ModelFiles:
    """Plan one recipe."""
    plan = make_plan(load_recipe(path), options.plan, resources, progress)
    for note in plan.notes:
        _LOG.info("%s", note if note.startswith(str(path)) else f"{path}: {note}")
    _LOG.info(
        "%s: plan %s, %s of output from %s of %s of experts",
        path,
        plan.plan_id,
        format_size(plan.outcome.output_bytes),
        format_size(plan.outcome.expert_bytes_planned),
        format_size(plan.outcome.expert_bytes_total),
    )
    files = ModelFiles(plan, resources, strict=False)
    # Compiling takes seconds the first time on a machine, and nothing later: kernels are kept on disk.
    progress.start("loading kernels", 0)
    files.engine.prepare()
    progress.finish()
    return files


def _start_recording(models: Sequence[MountedModel], catalog: Catalog, stop: threading.Event) -> threading.Thread:
    """Keep what is read of every model in the catalog, now and then and at the end."""

    def record() -> None:
        kept = dict.fromkeys((model.name for model in models), 0)
        ending = False
        while not ending:
            ending = stop.wait(_RECORDING_INTERVAL)
            for model in models:
                # A mount that nobody reads writes nothing.
                if model.files.engine.tally.total() != kept[model.name]:
                    kept[model.name] = keep_reading(model.files.engine, "mount", catalog)

    thread = threading.Thread(target=record, name="record", daemon=True)
    thread.start()
    return thread


def _start_warming(models: Sequence[MountedModel], stop: threading.Event) -> threading.Thread:
    """Gather the statistics of every tensor in the background."""

    def warm() -> None:
        for model in models:
            for name in model.files.plan.tensors:
                if stop.is_set():
                    return
                try:
                    model.files.engine.prepare_tensor(name)
                except MergefsError as error:
                    _LOG.warning("warming stopped: %s", error)
                    return
        _LOG.info("statistics of all tensors are gathered")

    thread = threading.Thread(target=warm, name="warm", daemon=True)
    thread.start()
    return thread
