"""Makes plans: opens the models, plans the tensors, spends the budget, and keeps the plan in the catalog."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import InputRecord, PlanEntryRecord, PlanRecord
from mergefs.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergefs.errors import BudgetError
from mergefs.methods.registry import get_method, method_origin
from mergefs.planner.analysis import analyze_family, gather_statistics, record_checkpoints
from mergefs.planner.budget import parse_budget
from mergefs.planner.identity import plan_identity
from mergefs.planner.layout import DEFAULT_SHARD_SIZE, lay_out
from mergefs.planner.plan import BudgetOutcome, MergePlan, PlanInput, Role, TensorPlan
from mergefs.planner.selection import select_blocks
from mergefs.planner.tensors import plan_tensors, require_known_parameters
from mergefs.progress import Progress, Silence
from mergefs.recipe.model import ModelReference, Recipe, find_model
from mergefs.recipe.parameters import unmatched_filters
from mergefs.sources.ledger import Ledger
from mergefs.sources.reader import SourceReader
from mergefs.statistics.identity import checkpoint_identity
from mergefs.statistics.service import StatisticsService


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan depends on beside the recipe.

    ``budget`` is as in ``parse_budget``, None for none. ``base`` names a model that stands in for what the budget does
    not buy, for recipes without a base.
    """

    budget: str | None = None
    base: str | None = None
    random_seed: int = 0
    max_shard_size: int = DEFAULT_SHARD_SIZE


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan before the budget is spent: every tensor is there and everything is read."""

    recipe: Recipe
    inputs: tuple[PlanInput, ...]
    stand_in: PlanInput | None
    donor: Checkpoint
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every distinct model that takes part."""
        entries = [*self.inputs, *([self.stand_in] if self.stand_in else [])]
        return tuple({id(entry.checkpoint): entry.checkpoint for entry in entries}.values())


def make_plan(
    recipe: Recipe,
    options: PlanOptions,
    catalog: Catalog,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> MergePlan:
    """Return the plan of ``recipe`` and keep it in the catalog.

    Without a budget only headers are read. A budget below all expert bytes needs block statistics: what is missing is
    gathered first, which reads the models once and is counted in ``ledger`` as analysis.
    """
    draft = draft_plan(recipe, options, catalog)
    total = sum(tensor.expert_bytes for tensor in draft.tensors)
    limit = total if options.budget is None else parse_budget(options.budget).limit(total)
    error = 0.0
    if limit < total:
        _require_stand_in(draft, options)
        draft = analyze_draft(draft, catalog, ledger or Ledger(), progress or Silence())
        result = select_blocks(draft.tensors, get_method(recipe.method), catalog, limit)
        draft, error = replace(draft, tensors=result.tensors), result.predicted_relative_error
    # A budget that pays for everything is no budget: the same plan, and the same files.
    budget_bytes = limit if limit < total else None
    plan = _assemble(draft, options, budget_bytes, error, catalog)
    _keep(plan, catalog)
    return plan


def draft_plan(recipe: Recipe, options: PlanOptions, catalog: Catalog) -> Draft:
    """Open the models of ``recipe`` and plan every tensor; reads headers only."""
    method = get_method(recipe.method)
    opened: dict[Path, Checkpoint] = {}
    inputs = tuple(
        _open(entry.model, recipe, Role.BASE if entry.model == recipe.base else Role.EXPERT, opened, catalog)
        for entry in recipe.inputs()
    )
    base = next((entry for entry in inputs if entry.role is Role.BASE), None)
    stand_in = None
    if base is None and options.base is not None:
        stand_in = _open(ModelReference(options.base, options.base, None, None), recipe, Role.BASE, opened, catalog)
    donor = (base or inputs[0]).checkpoint
    tensors, notes = plan_tensors(recipe, method, inputs, stand_in, donor, options.random_seed)
    require_known_parameters(recipe, unmatched_filters(recipe, (tensor.name for tensor in tensors)))
    return Draft(recipe, inputs, stand_in, donor, tensors, notes)


def analyze_draft(draft: Draft, catalog: Catalog, ledger: Ledger, progress: Progress) -> Draft:
    """Gather every statistic that planning and reading could need; the models then have identities by content."""
    method = get_method(draft.recipe.method)
    reader = SourceReader(ledger)
    try:
        analyze_family(draft.tensors, draft.checkpoints, catalog, reader, progress)
        gather_statistics(draft.tensors, method, StatisticsService(catalog, reader), progress)
    finally:
        catalog.flush()
        reader.close()

    def identified(entry: PlanInput) -> PlanInput:
        return replace(entry, identity=checkpoint_identity(entry.checkpoint, catalog))

    stand_in = identified(draft.stand_in) if draft.stand_in else None
    return replace(draft, inputs=tuple(identified(entry) for entry in draft.inputs), stand_in=stand_in)


def _open(
    reference: ModelReference, recipe: Recipe, role: Role, opened: dict[Path, Checkpoint], catalog: Catalog
) -> PlanInput:
    """Open one model, once."""
    path = find_model(reference, recipe).resolve()
    checkpoint = opened.get(path)
    if checkpoint is None:
        checkpoint = opened[path] = open_checkpoint(path)
    return PlanInput(reference.text, checkpoint, role, checkpoint_identity(checkpoint, catalog))


def _require_stand_in(draft: Draft, options: PlanOptions) -> None:
    """Refuse a budget where nothing can stand in for what is not read."""
    if draft.stand_in is None and not any(entry.role is Role.BASE for entry in draft.inputs):
        raise BudgetError(
            f"{draft.recipe.origin}: budget {options.budget!r} leaves blocks unread, and a {draft.recipe.method} "
            "merge without a base has nothing to stand in for them; name a model with --base, or read all: 100%"
        )


def _assemble(
    draft: Draft, options: PlanOptions, budget_bytes: int | None, error: float, catalog: Catalog
) -> MergePlan:
    """Lay out the files and name the plan."""
    plan_id = plan_identity(
        draft.recipe,
        draft.inputs,
        draft.stand_in,
        draft.tensors,
        budget_bytes,
        options.random_seed,
        options.max_shard_size,
        method_origin(draft.recipe.method),
    )
    known = catalog.plan(plan_id)
    return MergePlan(
        plan_id=plan_id,
        recipe=draft.recipe,
        method=get_method(draft.recipe.method),
        inputs=draft.inputs,
        stand_in=draft.stand_in,
        donor=draft.donor,
        tensors={tensor.name: tensor for tensor in draft.tensors},
        files=lay_out(draft.tensors, options.max_shard_size),
        outcome=_outcome(draft.tensors, budget_bytes, error),
        random_seed=options.random_seed,
        max_shard_size=options.max_shard_size,
        notes=draft.notes,
        created_ns=known.created_ns if known else time.time_ns(),
    )


def _outcome(tensors: Sequence[TensorPlan], budget_bytes: int | None, error: float) -> BudgetOutcome:
    """Add up what the plan costs."""
    blocks = selected = 0
    for tensor in tensors:
        for index, role in enumerate(tensor.roles):
            if role is Role.EXPERT:
                count = tensor.grid.count
                blocks += count
                selected += count if tensor.selection is None else int(tensor.selection.bought[index].sum())
    return BudgetOutcome(
        budget_bytes=budget_bytes,
        expert_bytes_total=sum(tensor.expert_bytes for tensor in tensors),
        expert_bytes_planned=sum(tensor.planned_expert_bytes for tensor in tensors),
        base_bytes=sum(tensor.base_bytes for tensor in tensors),
        output_bytes=sum(tensor.nbytes for tensor in tensors),
        blocks_total=blocks,
        blocks_selected=selected,
        predicted_relative_error=error,
    )


def _keep(plan: MergePlan, catalog: Catalog) -> None:
    """Write the plan to the catalog, unless it is there."""
    record_checkpoints({id(e.checkpoint): e.checkpoint for e in plan.all_inputs}.values(), catalog)
    if catalog.plan(plan.plan_id) is not None:
        return
    record = PlanRecord(
        plan_id=plan.plan_id,
        recipe=plan.recipe.text,
        origin=plan.recipe.origin,
        method=plan.recipe.method,
        budget_bytes=plan.outcome.budget_bytes,
        expert_bytes_total=plan.outcome.expert_bytes_total,
        expert_bytes_planned=plan.outcome.expert_bytes_planned,
        random_seed=plan.random_seed,
        max_shard_size=plan.max_shard_size,
        inputs=tuple(
            InputRecord(e.reference, str(e.checkpoint.path), e.role.value, e.identity, e.checkpoint.local_identity)
            for e in plan.all_inputs
        ),
        created_ns=plan.created_ns,
    )
    catalog.keep_plan(record, (_entry(tensor) for tensor in plan.tensors.values()))


def _entry(tensor: TensorPlan) -> PlanEntryRecord:
    """Return the record of one tensor."""
    selections: tuple[bytes | None, ...] = ()
    if tensor.selection is not None:
        selections = tuple(
            np.packbits(row).tobytes() if role is Role.EXPERT else None
            for row, role in zip(tensor.selection.bought, tensor.roles, strict=True)
        )
    return PlanEntryRecord(tensor.name, tensor.dtype.name, tensor.shape, selections)
