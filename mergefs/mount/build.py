"""From recipes on the command line to the tree that a mount shows."""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mergefs.allocator import limit_arenas
from mergefs.catalog import default_location
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.resources import DEFAULT_CACHE_SIZE, SMALLEST_CACHE_SIZE
from mergefs.engine.workspace import Workspace
from mergefs.errors import UsageError
from mergefs.mount.background import Background
from mergefs.mount.live import LiveTree
from mergefs.mount.models import ModelTree
from mergefs.mount.reach import refuse_models_inside
from mergefs.mount.reading_ahead import ReadingAhead
from mergefs.mount.recipe_files import expand_recipes
from mergefs.mount.serving_catalog import ServingCatalog
from mergefs.mount.tree import Tree
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.planner.targets import plan_target, recipe_target
from mergefs.progress import Progress, Silence
from mergefs.recipe.variants import Variant, vary
from mergefs.units import format_size

_LOG = logging.getLogger(__name__)

_AnyTree = TypeVar("_AnyTree", "ModelTree", "LiveTree")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What ``mergefs mount`` was asked for, beside the recipes. Sizes in bytes."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    catalog: Path | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    mountpoint: Path | None = None
    warm: bool = False
    verify_reads: bool = True


def build_tree(
    recipes: tuple[Path, ...], options: BuildOptions, progress: Progress | None = None
) -> ModelTree | LiveTree:
    """Plan every recipe and return the tree of their models.

    One recipe file becomes the root itself; a directory of recipes, or several recipes, become one directory each. The
    id of a kept plan stands for a recipe. Call it in the process that serves: the catalog does not survive a fork.
    """
    if options.cache_size < SMALLEST_CACHE_SIZE:
        raise UsageError(
            f"--cache-size {format_size(options.cache_size)} is too small for the blocks that parallel readers are in "
            f"the middle of; give at least {format_size(SMALLEST_CACHE_SIZE)}"
        )
    limit_arenas()
    catalog = ServingCatalog(options.catalog or default_location())
    resources = Workspace.create(catalog, options.cache_size, options.verify_reads)
    builder = _Builder(options, resources, progress or Silence(), ReadingAhead(options.cache_size))
    try:
        rooted = len(recipes) == 1 and not recipes[0].is_dir()
        tree = builder.rooted(recipes[0]) if rooted else builder.live(recipes)
        catalog.serving = True
        return tree
    except BaseException:
        resources.close()
        raise


@dataclass(frozen=True, slots=True)
class _Builder:
    """Plans the recipes of one mount and puts their models into a tree."""

    options: BuildOptions
    resources: Workspace
    progress: Progress
    ahead: ReadingAhead
    background: Background = field(default_factory=Background)

    def rooted(self, recipe: Path) -> ModelTree:
        """Return the tree of one model."""
        return self._accompanied(ModelTree(self._planned(recipe), self.resources, self.ahead, self._close))

    def live(self, recipes: tuple[Path, ...]) -> LiveTree:
        """Return the tree of several recipes.

        A recipe that is named and cannot be planned is an error; one that lies in a directory is shown as broken.
        """

        current = Path.cwd()  # the server leaves it, and relative paths go on to count from it

        def plan(path: Path, variant: Variant | None) -> ModelFiles:
            recipe, options = recipe_target(path, self.options.plan, self.resources.catalog, current)
            if variant is not None:
                recipe = vary(recipe, variant)
                options = replace(options, budget=variant.budget or options.budget)
            if self.options.mountpoint is not None:
                refuse_models_inside(self.options.mountpoint, recipe)
            return self._files(make_plan(recipe, options, self.resources, gather=False), Silence())

        tree = LiveTree(recipes, plan, self.resources, self.ahead, time.time_ns(), self._close)
        named = {path for path in recipes if not path.is_dir()}
        expand_recipes(recipes)
        for path in named:
            recipe_target(path, self.options.plan, self.resources.catalog)
        for name, path in tree.shelf.names().items():
            try:
                model = self._planned(path)
            except Exception as error:  # whatever it is, other recipes have nothing to do with it
                if path in named:
                    raise
                tree.shelf.put_error(name, path, error)
            else:
                tree.shelf.put(name, path, model)
        tree.start()
        return self._accompanied(tree)

    def _planned(self, target: Path) -> ModelFiles:
        """Plan a recipe, or make a kept plan again, gathering what is missing."""
        return self._files(plan_target(target, self.options.plan, self.resources, self.progress), self.progress)

    def _files(self, plan: MergePlan, progress: Progress) -> ModelFiles:
        """Return the files of a plan, and load the kernels that their reads need."""
        origin = plan.recipe.origin
        for note in plan.notes:
            _LOG.info("%s", note if note.startswith(origin) else f"{origin}: {note}")
        _LOG.info(
            "%s: plan %s, %s of output from %s of %s of experts",
            origin,
            plan.plan_id,
            format_size(plan.outcome.output_bytes),
            format_size(plan.outcome.expert_bytes_planned),
            format_size(plan.outcome.expert_bytes_total),
        )
        files = ModelFiles(plan, self.resources, strict=False)
        # Compiling takes seconds the first time on a machine, and nothing later: kernels are kept on disk.
        progress.start("loading kernels", 0)
        files.engine.prepare()
        progress.finish()
        return files

    def _accompanied(self, tree: _AnyTree) -> _AnyTree:
        """Begin what goes on beside answering for ``tree``."""
        if self.options.warm:
            self.background.warm(tree.models)
        self.background.record(lambda: tree.readable, self.resources.catalog)
        return tree

    def _close(self) -> None:
        """Release everything."""
        self.ahead.close()  # first, since what it has read is recorded, too
        self.background.end()
        self.resources.close()


def source_paths(tree: Tree) -> tuple[Path, ...]:
    """Return the model directories that ``tree`` reads from."""
    return tree.sources if isinstance(tree, ModelTree | LiveTree) else ()


def notes(tree: Tree) -> tuple[str, ...]:
    """Return what is worth telling of the plans that ``tree`` shows, each once."""
    models = tree.models if isinstance(tree, ModelTree | LiveTree) else ()
    return tuple(dict.fromkeys(note for model in models for note in model.plan.notes))
