"""A budget: what it leaves out is the base, what it buys is the merge, and no more is read than it allows.

What is really read is counted by strace and by the kernel's own counters, not by mergefs alone.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from examples import METHODS, Families, FamilyKind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import mounted_recipes, run_mergefs
from places import source_of, stored_tensor
from recipes import MERGES, base_options, recipe_document, stand_in, used_experts, write_document, write_recipe
from strace import Trace
from ways import WAYS, Reading, read_all

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.workspace import Workspace
from mergefs.errors import BudgetError
from mergefs.mount.mountinfo import all_mounts
from mergefs.planner.budget import parse_budget
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe
from mergefs.sources.blocks import BLOCK_ELEMENTS
from mergefs.sources.place import Role

BF16 = torch.bfloat16
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Analysed:
    """A family whose experts and statistics are known to the catalog, and a recipe for each way to merge it."""

    directory: Path
    family: Family
    catalog: Path
    state: Path

    def recipe(self, name: str) -> Path:
        return self.directory / f"{name.replace(' ', '-')}.yml"

    def plan(self, name: str, budget: str | None) -> MergePlan:
        options = PlanOptions(budget, stand_in(MERGES[name], self.family))
        with Catalog(self.catalog) as catalog:
            return make_plan(load_recipe(self.recipe(name)), options, Workspace.create(catalog))

    def expert_files(self, name: str) -> list[Path]:
        return [shard.path for e in used_experts(MERGES[name], self.family) for shard in open_checkpoint(e).shards]

    def header_bytes(self, name: str) -> int:
        models = [open_checkpoint(expert) for expert in used_experts(MERGES[name], self.family)]
        return sum(shard.header.data_start for model in models for shard in model.shards)

    def reading(self, name: str, budget: str) -> Reading:
        return Reading(self.recipe(name), budget, stand_in(MERGES[name], self.family), self.catalog, self.state)

    @property
    def extra(self) -> dict[str, str]:
        """What to add to the environment of a command."""
        return {"MERGEFS_CATALOG": str(self.catalog)}


def analysed(directory: Path, **shape: int) -> Analysed:
    made = family(directory, experts=2, dtype=BF16, tied=False, shards=2, **shape)
    result = Analysed(directory, made, directory / "catalog", directory / "state")
    for name, merge in MERGES.items():
        write_recipe(result.recipe(name), merge, made)
        options = base_options(merge, made)
        done = run_mergefs("analyze", *options, result.recipe(name), state=result.state, extra=result.extra)
        assert done.returncode == 0, done.stderr
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    """A family whose embeddings have several blocks each, the last of which is short."""
    return analysed(tmp_path_factory.mktemp("small"), hidden=32, vocabulary=3 * BLOCK_ELEMENTS // 32 + 5)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Analysed]:
    """Models of 18 MB on a disk, in 27 blocks each."""
    directory = disk_directory(tmp_path_factory)
    yield analysed(directory, hidden=512, vocabulary=4096)
    shutil.rmtree(directory)


def disk_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new directory on a file system that keeps files on a disk, so that reading them can be counted."""
    directory = tmp_path_factory.mktemp("large")
    below = [entry for entry in all_mounts() if directory.is_relative_to(entry.mountpoint)]
    kind = max(below, key=lambda entry: len(entry.mountpoint.parts)).filesystem
    assert kind not in ("tmpfs", "ramfs"), f"{directory} is on a {kind}; give pytest a --basetemp on a disk"
    return directory


def weight_bytes(analysed: Analysed, name: str, budget: str | None, recipe: Path | None = None) -> list[bytes]:
    """Return the weight files of the merged model."""
    base = stand_in(MERGES[name], analysed.family)
    with open_model(recipe or analysed.recipe(name), budget=budget, base=base, catalog=analysed.catalog) as model:
        return [model.read_file(file.name) for file in model.plan.files]


def merged_tensors(
    recipe: Path, catalog: Path, budget: str | None = None, base: str | None = None
) -> dict[str, torch.Tensor]:
    with open_model(recipe, budget=budget, base=base, catalog=catalog) as model:
        return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (a safetensors interface)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and bool(
        torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    )


# Nothing, everything, and what lies between ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(None, None), ("float32", None), ("float16", None), ("float32", "float16")]
)
@pytest.mark.parametrize("name", MERGES)
def test_budget_0_is_the_base_in_the_dtypes_of_the_recipe(
    small: Analysed, tmp_path: Path, name: str, dtype: str | None, out_dtype: str | None
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES[name], small.family, dtype, out_dtype)
    with open_model(recipe, budget="0", base=stand_in(MERGES[name], small.family), catalog=small.catalog) as model:
        for tensor, stored in tensors_of(small.family.base).items():
            expected = stored
            for step in (dtype, out_dtype):
                expected = expected.to(getattr(torch, step)) if step else expected
            assert same_bits(model.get_tensor(tensor), expected), tensor
        assert model.bytes_read["expert_bytes_read"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_holds_for_every_method_and_leaves_the_base_where_it_buys_nothing(
    tmp_path: Path, families: Families, name: str
) -> None:
    made, merge = families(FamilyKind()), METHODS[name]
    recipe = write_recipe(tmp_path / "recipe.yml", merge, made)
    stands_in = stand_in(merge, made)
    with open_model(recipe, budget="0", base=stands_in) as model:
        for tensor, stored in tensors_of(made.base).items():
            assert same_bits(model.get_tensor(tensor), stored), tensor
    with open_model(recipe, budget="50%", base=stands_in) as model:
        for tensor in model.keys():  # noqa: SIM118 (a safetensors interface)
            assert bool(model.get_tensor(tensor).isfinite().all())
        outcome = model.plan.outcome
        assert outcome.budget_bytes is not None
        assert 0 < model.bytes_read["expert_bytes_read"] == outcome.expert_bytes_planned <= outcome.budget_bytes


@pytest.mark.parametrize("name", MERGES)
def test_budget_100_percent_is_the_unbudgeted_merge(small: Analysed, name: str) -> None:
    unbudgeted = small.plan(name, None)
    total = unbudgeted.outcome.expert_bytes_total
    expected = weight_bytes(small, name, None)
    for budget in ("100%", str(total), "1TiB"):
        assert small.plan(name, budget).plan_id == unbudgeted.plan_id
        assert weight_bytes(small, name, budget) == expected


@pytest.mark.parametrize("name", MERGES)
def test_a_budget_for_every_block_that_differs_from_the_base_is_the_unbudgeted_merge_too(
    small: Analysed, name: str
) -> None:
    total = small.plan(name, None).outcome.expert_bytes_total
    nearly = small.plan(name, str(total - 1))
    assert nearly.outcome.expert_bytes_planned < total  # frozen tensors cost nothing
    assert nearly.outcome.predicted_relative_error == 0
    assert nearly.outcome.blocks_selected == nearly.outcome.blocks_total
    assert weight_bytes(small, name, str(total - 1)) == weight_bytes(small, name, None)


@pytest.mark.parametrize("budget", ["1%", "30%", "70%"])
@pytest.mark.parametrize("name", ["task_arithmetic", "linear without a base"])
def test_an_unread_block_of_an_expert_counts_as_equal_to_the_base(
    small: Analysed, tmp_path: Path, name: str, budget: str
) -> None:
    """Experts whose unread blocks were overwritten with the base's give the same merge without a budget."""
    merge = MERGES[name]
    plan = small.plan(name, budget)
    base = tensors_of(small.family.base)
    patched = []
    for index, expert in enumerate(used_experts(merge, small.family)):
        directory = tmp_path / f"patched-{index + 1}"
        shutil.copytree(expert, directory)
        tensors = tensors_of(expert)
        for tensor in plan.tensors.values():
            assert tensor.selection is not None
            position = next(i for i, p in enumerate(tensor.places) if source_of(p) == expert.resolve())
            for block, (start, stop) in enumerate(tensor.grid):
                if not tensor.selection.read[position, block]:
                    tensors[tensor.name].view(-1)[start:stop] = base[tensor.name].view(-1)[start:stop]
        rewrite_tensors(directory, tensors)
        patched.append(directory)
    recipe = write_recipe(tmp_path / "patched.yml", merge, Family(small.family.base, tuple(patched)))
    merged = merged_tensors(recipe, catalog=tmp_path / "catalog")
    budgeted = merged_tensors(
        small.recipe(name), budget=budget, base=stand_in(merge, small.family), catalog=small.catalog
    )
    computed = untouched = 0
    for tensor in plan.tensors.values():
        assert tensor.selection is not None
        for block, (start, stop) in enumerate(tensor.grid):
            got = budgeted[tensor.name].view(-1)[start:stop]
            if tensor.selection.computed[block]:
                computed += 1
                assert same_bits(got, merged[tensor.name].view(-1)[start:stop]), (tensor.name, block)
            else:
                # The base's block, whatever the weights of the recipe add up to.
                untouched += 1
                assert same_bits(got, base[tensor.name].view(-1)[start:stop]), (tensor.name, block)
    assert untouched
    assert computed or budget == "1%"


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "slerp"])
def test_a_block_that_every_expert_was_bought_for_is_that_of_the_whole_merge(small: Analysed, name: str) -> None:
    """Thresholds, angles and random masks are those of the whole tensor, not of what a budget buys of it."""
    plan = small.plan(name, "60%")
    whole = merged_tensors(small.recipe(name), catalog=small.catalog)
    budgeted = merged_tensors(small.recipe(name), budget="60%", catalog=small.catalog)
    complete = partial = 0
    for tensor in plan.tensors.values():
        assert tensor.selection is not None
        for block, (start, stop) in enumerate(tensor.grid):
            if tensor.selection.bought[:, block].all() and tensor.selection.computed[block]:
                complete += 1
                mine, theirs = (model[tensor.name].view(-1)[start:stop] for model in (budgeted, whole))
                assert same_bits(mine, theirs), (tensor.name, block)
            else:
                partial += 1
    assert complete
    assert partial


def test_tensors_that_are_copied_from_an_expert_are_never_read_beyond_the_budget(tmp_path: Path) -> None:
    """A linear merge without a base copies whole-number tensors: they are alike in all models, so --base has them."""
    made = family(tmp_path, experts=2, dtype=BF16, tied=True, shards=1)
    for directory in (made.base, *made.experts):
        rewrite_tensors(directory, tensors_of(directory) | {"model.steps": torch.arange(5000)})
    recipe = write_recipe(tmp_path / "linear.yml", MERGES["linear without a base"], made)
    with open_model(recipe, budget="0", base=str(made.base), catalog=tmp_path / "catalog") as model:
        assert model.plan.outcome.expert_bytes_planned == 0
        assert torch.equal(model.get_tensor("model.steps"), torch.arange(5000))
        assert model.bytes_read["expert_bytes_read"] == 0


def test_a_budget_that_cannot_pay_for_what_must_be_copied_is_refused(tmp_path: Path) -> None:
    made = family(tmp_path, experts=2, dtype=BF16, tied=True, shards=1)
    for directory in made.experts:
        rewrite_tensors(directory, tensors_of(directory) | {"model.rotary_emb.inv_freq": torch.arange(5000)})
    recipe = write_recipe(tmp_path / "linear.yml", MERGES["linear without a base"], made)
    open_it = partial(open_model, recipe, base=str(made.base), catalog=tmp_path / "catalog")
    with pytest.raises(BudgetError, match=r"'model.rotary_emb.inv_freq'.*; raise the budget"):
        open_it(budget="39999")
    with open_it(budget="40000") as model:
        assert model.plan.outcome.expert_bytes_planned == 40000
        assert torch.equal(model.get_tensor("model.rotary_emb.inv_freq"), torch.arange(5000))
        assert model.bytes_read["expert_bytes_read"] == 40000


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite_tensors(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of ``model`` by one file with ``tensors``."""
    from safetensors.torch import save_file

    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# What a plan promises -------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", MERGES)
def test_more_budget_never_costs_more_than_it_is_nor_predicts_a_larger_error(
    small: Analysed, name: str, data: st.DataObject
) -> None:
    total = small.plan(name, None).outcome.expert_bytes_total
    budgets = sorted(data.draw(st.lists(st.integers(0, total + 1), min_size=2, max_size=4)))
    plans = [small.plan(name, str(budget)) for budget in budgets]
    for budget, plan in zip(budgets, plans, strict=True):
        assert plan.outcome.expert_bytes_planned <= budget
        assert plan.outcome.budget_bytes == (budget if budget < total else None)
    errors = [plan.outcome.predicted_relative_error for plan in plans]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert (errors[0] <= 1.0) and (errors[-1] >= 0.0)
    for first, second in itertools.pairwise(plans):
        same = first.outcome.budget_bytes == second.outcome.budget_bytes
        assert (first.plan_id == second.plan_id) is same
        assert not same or purchases(first) == purchases(second)


@given(share=st.floats(0, 100, allow_nan=False))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_share_is_never_exceeded_by_a_byte(small: Analysed, share: float) -> None:
    outcome = small.plan("ties", f"{share:.6f}%").outcome
    assert outcome.expert_bytes_planned <= float(f"{share:.6f}") / 100 * outcome.expert_bytes_total


def purchases(plan: MergePlan) -> object:
    """Return which blocks of which expert a plan buys, in a form that can be compared."""
    return [
        None if tensor.selection is None else (tensor.selection.bought.tobytes(), tensor.selection.computed.tobytes())
        for tensor in plan.tensors.values()
    ]


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_under_a_budget_has_the_same_id_wherever_the_models_are(
    small: Analysed, tmp_path: Path, name: str, shards: int
) -> None:
    models = [small.family.base, *small.family.experts]
    copies = [tmp_path / model.name for model in models]
    for model, copy in zip(models, copies, strict=True):
        shutil.copytree(model, copy)
        reshard(copy, shards)
    moved = Family(copies[0], tuple(copies[1:]))
    recipe = write_recipe(tmp_path / "elsewhere.yml", MERGES[name], moved)
    with Catalog(tmp_path / "other catalog") as catalog:
        plan = make_plan(
            load_recipe(recipe), PlanOptions("40%", stand_in(MERGES[name], moved)), Workspace.create(catalog)
        )
    assert plan.plan_id == small.plan(name, "40%").plan_id
    assert not plan.plan_id.startswith("local-")


def reshard(model: Path, shards: int) -> None:
    """Write the weights of ``model`` again, spread over ``shards`` files in another order."""
    from checkpoints import write_model

    tensors = tensors_of(model)
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()
    config = json.loads((model / "config.json").read_text())
    write_model(model, dict(reversed(tensors.items())), config, shards)


def test_a_plan_changes_its_id_with_the_contents_of_a_model(small: Analysed, tmp_path: Path) -> None:
    shutil.copytree(small.family.experts[0], tmp_path / "changed")
    tensors = tensors_of(tmp_path / "changed")
    tensors["model.norm.weight"][0] += 1
    rewrite_tensors(tmp_path / "changed", tensors)
    document = recipe_document(MERGES["ties"], small.family)
    document["models"][0]["model"] = str(tmp_path / "changed")
    recipe = write_document(tmp_path / "changed.yml", document)
    with Catalog(tmp_path / "catalog") as catalog:
        changed = make_plan(load_recipe(recipe), PlanOptions("40%"), Workspace.create(catalog))
    assert changed.plan_id != small.plan("ties", "40%").plan_id


# What the process really reads ----------------------------------------------------------------------------------------


def planned_trace(analysed: Analysed, name: str, budget: str, way: str, directory: Path) -> Trace:
    """Return what one way to read a merge reads once its plan has been made.

    Making one may merge blocks to see what it leaves out, which the catalog then knows.
    """
    analysed.plan(name, budget)
    return WAYS[way](analysed.reading(name, budget), directory)


def assert_within_budget(analysed: Analysed, name: str, budget: str, trace: Trace) -> None:
    plan = analysed.plan(name, budget)
    experts = analysed.expert_files(name)
    headers = analysed.header_bytes(name)
    read = trace.total(experts)
    assert read <= parse_budget(budget).limit(plan.outcome.expert_bytes_total) + headers
    assert read == plan.outcome.expert_bytes_planned + headers
    assert trace.mapped.isdisjoint(path.resolve() for path in experts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "linear without a base"])
def test_strace_counts_no_more_expert_bytes_than_the_budget_and_the_headers(
    large: Analysed, tmp_path: Path, name: str, way: str
) -> None:
    trace = planned_trace(large, name, "25%", way, tmp_path)
    assert_within_budget(large, name, "25%", trace)
    assert large.plan(name, "25%").outcome.expert_bytes_planned > 0


@pytest.mark.parametrize("budget", ["0", "1", "1023", "1048575", "1048577", "3.5MB", "7.77%", "66%", "100%"])
def test_budgets_of_every_kind_hold_for_a_mount(large: Analysed, tmp_path: Path, budget: str) -> None:
    assert_within_budget(large, "ties", budget, planned_trace(large, "ties", budget, "mount", tmp_path))


# What the disk reads --------------------------------------------------------------------------------------------------


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Make the next read of these files come from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk(pid: int) -> int:
    """Return how many bytes the disk has read for a process (``read_bytes`` of proc(5))."""
    counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counters["read_bytes"])


def pages_of_bought_blocks(plan: MergePlan) -> int:
    """Return the bytes of all pages of expert files that hold a byte of a bought block."""
    pages: set[tuple[Path, int]] = set()
    for tensor in plan.tensors.values():
        assert tensor.selection is not None
        for place, role, read in zip(tensor.places, tensor.roles, tensor.selection.read, strict=True):
            if role is not Role.EXPERT:
                continue
            path, itemsize = stored_tensor(place).shard.path, place.dtype.itemsize
            for block in np.flatnonzero(read):
                start, stop = (
                    stored_tensor(place).tensor.offset + bound * itemsize for bound in tensor.grid.bounds(int(block))
                )
                pages |= {(path, page) for page in range(start // PAGE, -(-stop // PAGE))}
    return len(pages) * PAGE


def whole_pages(path: Path) -> int:
    return -(-path.stat().st_size // PAGE) * PAGE


def faults_from_disk(pid: int) -> int:
    """Return how often a process has waited for a page of its own code or data (``majflt`` of proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])


@pytest.mark.parametrize("name", ["ties", "task_arithmetic"])
def test_the_disk_reads_only_the_pages_of_bought_blocks(large: Analysed, tmp_path: Path, name: str) -> None:
    """Pages of the server's own code count for it as well, so a reading during which it missed one is repeated.

    Each by a server of its own: models of one mount share what they read of their sources.
    """
    base = [shard.path for shard in open_checkpoint(large.family.base).shards]
    experts = large.expert_files(name)
    recipe = write_recipe(tmp_path / "merge.yml", MERGES[name], large.family)
    with Catalog(large.catalog) as catalog:
        plan = make_plan(load_recipe(recipe), PlanOptions("25%"), Workspace.create(catalog))
    allowed = pages_of_bought_blocks(plan) + sum(map(whole_pages, base))
    needed = plan.outcome.expert_bytes_planned + plan.outcome.base_bytes
    # A block may touch one page more at each of its ends.
    assert allowed <= needed + 2 * PAGE * plan.outcome.blocks_selected + 2 * PAGE * len(base)
    clean = False
    for number in range(8):
        with mounted_recipes(
            recipe,
            mountpoint=tmp_path / f"mnt-{number}",
            state=tmp_path,
            options=["--budget", "25%"],
            extra=large.extra,
        ) as mount:
            drop_from_page_cache([*experts, *base])
            faults, before = faults_from_disk(mount.pid), bytes_from_disk(mount.pid)
            read_all(mount.mountpoint)
            read = bytes_from_disk(mount.pid) - before
            clean = faults_from_disk(mount.pid) == faults
        assert read >= needed, "the cache was not cold"
        if clean:
            assert read <= allowed
            break
    assert clean, "the server missed pages of its own in each reading"
