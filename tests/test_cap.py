"""The cap is never exceeded: what the operating system returned of experts and planes, under budgets of all kinds.

Each model is analysed and each plan made beforehand by another process, this one; so the process that strace watches
may read headers and what its plan buys, and nothing else. Every value of kind, planes, method, way and budget meets
every value of every other in some row.
"""

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from checkpoints import Family, fine_tuned, llama_config, llama_tensors, write_model
from parity_pairwise import cover
from recipes import MERGES, stand_in, write_recipe
from strace import Trace, run
from ways import WAYS, Reading

from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.workspace import Workspace
from mergefs.planes.analysis import analyze_planes
from mergefs.planes.files import planes_directory
from mergefs.planner.budget import parse_budget
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.planner.planes import delta_tasks
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources.blocks import BLOCK_ELEMENTS

HIDDEN: Final = 32
VOCABULARY: Final = 2 * BLOCK_ELEMENTS // HIDDEN + 5
"""Embeddings of three blocks, the last of five rows; every other tensor is one short block."""

PLANES: Final = 3
METHODS: Final = ("task_arithmetic", "ties", "dare_ties", "linear without a base")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is stored."""

    dtype: torch.dtype = torch.bfloat16
    shards: int = 1
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """How a base and its two experts are stored, and what the experts have of each other's and of the base's bytes."""

    base: Layout = Layout()
    experts: tuple[Layout, Layout] = (Layout(), Layout())
    frozen: Callable[[str], bool] = lambda name: False
    shared: Callable[[str], bool] = lambda name: False


KINDS: Final = {
    "alike": Kind(),
    "float32 experts": Kind(experts=(Layout(torch.float32), Layout(torch.float32, 2))),
    "mixed dtypes": Kind(experts=(Layout(torch.float16, 2), Layout(torch.float32))),
    "other shards": Kind(Layout(shards=3), (Layout(shards=2, backwards=True), Layout(shards=5))),
    "shared blocks": Kind(shared=lambda name: "proj" in name or "embed" in name, frozen=lambda name: "mlp" in name),
}


@dataclass(frozen=True, slots=True)
class World:
    """A family of some kind that is analysed, with or without planes, for every method."""

    family: Family
    directory: Path
    planes: bool
    catalog: Path

    def recipe(self, method: str) -> Path:
        return self.directory / f"{method.replace(' ', '-')}.yml"

    def reading(self, method: str, budget: str) -> Reading:
        base = stand_in(MERGES[method], self.family)
        return Reading(self.recipe(method), budget, base, self.catalog, self.directory / "state")

    def plan(self, method: str, budget: str) -> MergePlan:
        options = PlanOptions(budget, stand_in(MERGES[method], self.family))
        with Catalog(self.catalog) as catalog:
            return make_plan(load_recipe(self.recipe(method)), options, Workspace.create(catalog))

    @property
    def expert_files(self) -> list[Path]:
        return [shard.path for expert in self.family.experts for shard in open_checkpoint(expert).shards]

    @property
    def plane_files(self) -> list[Path]:
        return sorted(planes_directory(self.catalog).glob("*")) if self.planes else []

    @property
    def header_bytes(self) -> int:
        models = [open_checkpoint(expert) for expert in self.family.experts]
        return sum(shard.header.data_start for model in models for shard in model.shards)


def store(directory: Path, tensors: Tensors, layout: Layout) -> Path:
    """Write a model as a layout says."""
    order = reversed(tensors.items()) if layout.backwards else tensors.items()
    stored = {name: tensor.to(layout.dtype) for name, tensor in order}
    config = llama_config(layout.dtype, hidden=HIDDEN, layers=1, vocabulary=VOCABULARY, tied=True)
    return write_model(directory, stored, config, layout.shards, tokenizer_files=False)


def write_family(directory: Path, kind: Kind) -> Family:
    """Write a base and two experts; half of the second one's embedding is the first one's, where bytes are shared."""
    shape = {"hidden": HIDDEN, "layers": 1, "vocabulary": VOCABULARY, "tied": True}
    base = llama_tensors(0, torch.bfloat16, **shape)
    frozen = {name for name in base if kind.frozen(name)}
    first, second = (fine_tuned(base, torch.bfloat16, seed=seed, frozen=frozen) for seed in (1, 2))
    for name in base:
        if kind.shared(name):
            second[name].view(-1)[:BLOCK_ELEMENTS] = first[name].view(-1)[:BLOCK_ELEMENTS]
    experts = (
        store(directory / f"expert-{number}", tensors, layout)
        for number, (tensors, layout) in enumerate(zip((first, second), kind.experts, strict=True), start=1)
    )
    return Family(store(directory / "base", base, kind.base), tuple(experts))


def analyse(world: World, methods: Sequence[str] = METHODS) -> None:
    """Write the recipes and gather everything that plans of them need, and planes where they are wanted."""
    for method in methods:
        write_recipe(world.recipe(method), MERGES[method], world.family)
        with Catalog(world.catalog) as catalog:
            workspace = Workspace.create(catalog)
            options = PlanOptions(base=stand_in(MERGES[method], world.family))
            draft = draft_plan(load_recipe(world.recipe(method)), options, workspace)
            analyze_draft(draft, workspace, Silence())
            if world.planes:
                tasks = delta_tasks(draft.tensors, draft.sources, PLANES)
                analyze_planes(tasks, catalog, workspace.reader, Silence())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], World]:
    """Make worlds when they are asked for, each once."""
    made: dict[tuple[str, str], World] = {}
    families: dict[str, Family] = {}

    def world(kind: str, planes: str) -> World:
        if (kind, planes) not in made:
            directory = tmp_path_factory.mktemp("world")
            if kind not in families:
                families[kind] = write_family(tmp_path_factory.mktemp("family"), KINDS[kind])
            made[kind, planes] = World(families[kind], directory, planes == "planes", directory / "catalog")
            analyse(made[kind, planes])
        return made[kind, planes]

    return world


def read_of_experts(world: World, trace: Trace) -> int:
    """Return the bytes that were read of experts and their planes, without headers; none of them may be mapped."""
    files = [*world.expert_files, *world.plane_files]
    assert trace.mapped.isdisjoint(path.resolve() for path in files)
    return trace.total(files) - world.header_bytes


BLOCK: Final = str(2 * BLOCK_ELEMENTS)
ROWS: Final = cover(
    {
        "kind": list(KINDS),
        "planes": ["planes", "no planes"],
        "method": list(METHODS),
        "way": list(WAYS),
        "budget": ["0", BLOCK, "100003", "33.3%", "99.99%"],
    }
).rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_no_way_to_read_a_merge_reads_more_of_the_experts_than_its_budget(
    worlds: Callable[[str, str], World], tmp_path: Path, row: dict[str, str]
) -> None:
    world, method, budget = worlds(row["kind"], row["planes"]), row["method"], row["budget"]
    outcome = world.plan(method, budget).outcome
    trace = WAYS[row["way"]](world.reading(method, budget), tmp_path)
    read = read_of_experts(world, trace)
    assert read <= parse_budget(budget).limit(outcome.expert_bytes_total)
    assert read == outcome.expert_bytes_planned
    assert (read > 0) == (budget != "0")
    if world.planes and budget == "33.3%":
        assert trace.total(world.plane_files) > 0


# Many budgets in one process ------------------------------------------------------------------------------------------

_READ_ALL_UNDER_BUDGETS: Final = """
import sys, mergefs
for recipe, budget in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    with mergefs.open(recipe, budget=budget) as model:
        for file in model.plan.files:
            model.read_file(file.name)
        assert model.bytes_read["analysis_bytes_read"] == 0
"""


def linked(model: Path, directory: Path) -> Path:
    """Return a copy of a model whose files are the same ones under other names, so that strace tells them apart."""
    directory.mkdir(parents=True)
    for file in model.iterdir():
        os.link(file, directory / file.name)
    return directory


def total_bytes(family: Family) -> int:
    return sum(file.stat().st_size for expert in family.experts for file in expert.glob("*.safetensors"))


@pytest.mark.parametrize("planes", [True, False], ids=["planes", "no planes"])
def test_every_budget_holds_down_to_the_byte(tmp_path: Path, planes: bool) -> None:
    """Each budget has a recipe over names of its own for the same experts: so one process is enough for all."""
    made = write_family(tmp_path, KINDS["mixed dtypes"])
    draw = random.Random(4)
    edges = [1, 2 * BLOCK_ELEMENTS - 1, 2 * BLOCK_ELEMENTS + 1, total_bytes(made) // 16]
    budgets = [*edges, *(draw.randrange(total_bytes(made)) | 1 for _ in range(12))]
    worlds = []
    for number in range(len(budgets)):
        experts = tuple(linked(expert, tmp_path / f"{number}" / expert.name) for expert in made.experts)
        worlds.append(World(Family(made.base, experts), tmp_path / f"{number}", planes, tmp_path / "catalog"))
    for number, world in enumerate(worlds):
        analyse(world, [METHODS[number % 3]])
    plans = [world.plan(METHODS[n % 3], str(budgets[n])) for n, world in enumerate(worlds)]
    arguments = [str(part) for n, w in enumerate(worlds) for part in (w.recipe(METHODS[n % 3]), budgets[n])]
    trace = run(
        tmp_path / "trace",
        [sys.executable, "-c", _READ_ALL_UNDER_BUDGETS, *arguments],
        worlds[0].reading(METHODS[0], "0").environment,
    )
    planned = [plan.outcome.expert_bytes_planned for plan in plans]
    whole = [trace.total(world.expert_files) - world.header_bytes for world in worlds]
    coded = trace.total(worlds[0].plane_files)
    for budget, buys, read in zip(budgets, planned, whole, strict=True):
        assert 0 <= read <= buys <= budget
    assert sum(whole) + coded == sum(planned) > 0
    assert (coded > 0) == planes
    if not planes:
        assert whole == planned
