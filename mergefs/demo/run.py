"""``mergefs demo``: trains a family, merges it, mounts it, measures it, and writes it, in a few minutes."""

import filecmp
import gc
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from mergefs.catalog import Catalog
from mergefs.demo.corpus import Domain, load_domains
from mergefs.demo.display import Row, markdown_table, show_table, training_progress
from mergefs.demo.evaluation import generate_line, perplexity
from mergefs.demo.mounted import mount_status, mounted
from mergefs.demo.recipes import DemoRecipe, write_recipes
from mergefs.demo.training import FamilyOptions, train_family
from mergefs.engine.workspace import Workspace
from mergefs.errors import VerificationError
from mergefs.evaluation.imports import import_transformers
from mergefs.materialize.manifest import MANIFEST_NAME
from mergefs.materialize.materialize import materialize
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.recipe.model import load_recipe
from mergefs.units import format_size

_BUDGETS: Final = ("100%", "25%")
_EVALUATION_BYTES: Final = 16 * 1024
_EVALUATION_BATCH: Final = 16
_PROMPT: Final = "#define PyObject_"


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where the demo keeps its things, all below one directory."""

    directory: Path
    catalog: Path

    @property
    def mountpoint(self) -> Path:
        """Where the merges are mounted, one after the other."""
        return self.directory / "mnt"

    @property
    def written(self) -> Path:
        """Where the winner is written."""
        return self.directory / "merged"


def run_demo(directory: Path, catalog: Path | None, options: FamilyOptions | None = None) -> None:
    """Run the whole demo below ``directory``; a family that was trained there before is used again.

    ``options`` say how large the models are and how long they are trained.
    """
    started = time.monotonic()
    place = Workplace(directory, catalog or directory / "catalog")
    domains = load_domains()
    options = options or FamilyOptions()
    _say(f"1. training a family in {directory}: a base, and an expert for each of {_listed(domains)}")
    with training_progress() as report:
        family = train_family(directory / "models", options, domains, report)
    recipes = write_recipes(directory / "models" / "recipes", family)
    _say("2. measuring the base and the experts")
    rows = [Row(path.name, _measure(_load(path), domains, options)) for path in (family.base, *family.experts)]
    for number, recipe in enumerate(recipes, start=3):
        _say(f"{number}. mounting {recipe.path.name} at 100 % and at 25 % of the expert bytes, and loading the mount")
        rows += [_measure_mount(recipe, budget, place, domains, options) for budget in _BUDGETS]
    names = [domain.name for domain in domains]
    show_table(names, rows)
    (directory / "table.md").write_text(markdown_table(names, rows), encoding="utf-8")
    _say("5. writing the winner to disk and comparing every file with the mount")
    _write_and_compare(recipes[0], place)
    _say(f"done in {time.monotonic() - started:.0f} s. Try it yourself:\n")
    _show_next_steps(place, recipes)


def _say(text: str) -> None:
    click.echo(text)


def _listed(domains: Sequence[Domain]) -> str:
    return ", ".join(domain.title for domain in domains)


def _load(path: Path) -> Any:
    """Load a model with transformers, as a user would."""
    return import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def _measure(model: Any, domains: Sequence[Domain], options: FamilyOptions) -> tuple[float, ...]:
    """Return the held-out perplexity on each domain."""
    return tuple(
        perplexity(
            model,
            domain.held_out,
            context=options.context,
            batch=_EVALUATION_BATCH,
            limit_bytes=_EVALUATION_BYTES,
        )
        for domain in domains
    )


def _measure_mount(
    recipe: DemoRecipe, budget: str, place: Workplace, domains: Sequence[Domain], options: FamilyOptions
) -> Row:
    """Mount a recipe, load the mount, measure it, and let it write a line."""
    with mounted(recipe.path, place.mountpoint, place.catalog, budget) as mountpoint:
        model = _load(mountpoint)
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(mountpoint)
        row = Row(
            f"{recipe.title}, {budget.removesuffix('%')} %",
            _measure(model, domains, options),
            planned=int(mount_status(mountpoint)["expert_bytes_planned"]),
            read=int(mount_status(mountpoint)["expert_bytes_read"]),
        )
        line = generate_line(model, tokenizer, _PROMPT)
        # The weights of the model are the mounted file itself, mapped; the mount is busy until they are gone.
        del model
        gc.collect()
    click.echo(f"   {row.model} writes: {line!r}")
    return row


def _write_and_compare(recipe: DemoRecipe, place: Workplace) -> None:
    """Materialize a recipe and compare it with its mount, file by file."""
    resources = Workspace.create(Catalog(place.catalog))
    try:
        plan = make_plan(load_recipe(recipe.path), PlanOptions(), resources)
        result = materialize(plan, place.written, resources, overwrite=True)
    finally:
        resources.close()
    with mounted(recipe.path, place.mountpoint, place.catalog, "100%") as mountpoint:
        shown = {path.relative_to(mountpoint).as_posix() for path in mountpoint.rglob("*") if path.is_file()}
        found = {path.relative_to(place.written).as_posix() for path in place.written.rglob("*") if path.is_file()}
        if shown != found - {MANIFEST_NAME}:
            raise VerificationError(f"{place.written}: its files are not those of the mount: {shown ^ found}")
        for name in sorted(shown):
            if not filecmp.cmp(mountpoint / name, place.written / name, shallow=False):
                raise VerificationError(f"{place.written / name}: differs from the mount; this is a bug in mergefs")
    click.echo(f"   {len(shown)} files, {format_size(result.bytes_written)}, equal to the mount byte for byte")


def _show_next_steps(place: Workplace, recipes: Sequence[DemoRecipe]) -> None:
    """Print commands to go on with."""
    # In a virtual environment that is not active, the command has no short name.
    program = "mergefs" if shutil.which("mergefs") else sys.argv[0]
    ours = f"{program} --catalog {place.catalog}"
    click.echo(f"  {ours} mount {recipes[0].path.parent} {place.mountpoint}")
    click.echo(f"  ls -lR {place.mountpoint}")
    click.echo(f"  {ours} status")
    click.echo(f"  {program} umount {place.mountpoint}")
    click.echo(f"  {ours} plan {recipes[1].path} --budget 10%")
    click.echo(f"  {program} verify {place.written}")
    click.echo(f"\nEverything is below {place.directory}; remove that directory when you have seen enough.")
