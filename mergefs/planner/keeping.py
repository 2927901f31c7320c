"""Keeps plans in the catalog, with all that is needed to make each again without its recipe's file."""

import zlib

import msgspec
import numpy as np

from mergefs import __version__
from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import InputRecord, PlanEntryRecord, PlanRecord, SelectionRecord
from mergefs.methods.registry import method_origin
from mergefs.planner.analysis import record_checkpoints
from mergefs.planner.identity import IDS, files_identity
from mergefs.planner.levels import Selection
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.sources.blocks import BlockGrid


def keep_plan(plan: MergePlan, catalog: Catalog) -> None:
    """Write the plan to the catalog, unless it is there."""
    record_checkpoints(plan.sources, catalog)
    record = _record(plan)
    if catalog.plan(plan.plan_id) != record:
        catalog.keep_plan(record, (_entry(tensor) for tensor in plan.tensors.values()))


def _record(plan: MergePlan) -> PlanRecord:
    """Return what is kept of the plan as a whole."""
    origin = method_origin(plan.recipe.method)
    return PlanRecord(
        plan_id=plan.plan_id,
        recipe=plan.recipe.text,
        origin=plan.recipe.origin,
        method=plan.recipe.method,
        budget_bytes=plan.outcome.budget_bytes,
        expert_bytes_total=plan.outcome.expert_bytes_total,
        expert_bytes_planned=plan.outcome.expert_bytes_planned,
        random_seed=plan.options.random_seed,
        max_shard_size=plan.options.max_shard_size,
        inputs=tuple(
            InputRecord(
                entry.reference,
                entry.model.title,
                entry.role.value,
                entry.identity,
                entry.model.sources[0].local_identity if entry.model.merged is None else entry.identity,
            )
            for entry in plan.all_inputs
        ),
        created_ns=plan.created_ns,
        directories=tuple(map(str, plan.recipe.directories)),
        options=msgspec.to_builtins(plan.options),
        outcome=msgspec.to_builtins(plan.outcome),
        made_by={
            "mergefs": __version__,
            "ids": IDS,
            "method": str(origin or ""),
            "tokenizer": plan.tokenizer or "",
            "files": files_identity(plan.all_inputs),
        },
    )


def _entry(tensor: TensorPlan) -> PlanEntryRecord:
    """Return the record of one tensor."""
    record = None if tensor.selection is None else selection_record(tensor.selection)
    return PlanEntryRecord(tensor.name, tensor.dtype.name, tensor.shape, record)


def selection_record(selection: Selection) -> SelectionRecord:
    """Return what is kept of a selection."""
    return SelectionRecord(
        selection.cell,
        tuple(zlib.compress(row.tobytes()) for row in selection.levels),
        zlib.compress(selection.givers.astype("<i2").tobytes()),
        np.packbits(selection.computed).tobytes(),
    )


def recorded_selection(record: SelectionRecord, grid: BlockGrid) -> Selection:
    """Return the selection that a record was made of."""
    inputs = len(record.levels)
    levels = b"".join(zlib.decompress(row) for row in record.levels)
    return Selection(
        grid,
        record.cell,
        np.frombuffer(levels, dtype=np.uint8).reshape(inputs, -1),
        np.frombuffer(zlib.decompress(record.givers), dtype="<i2").astype(np.int16).reshape(inputs, -1),
        np.unpackbits(np.frombuffer(record.computed, dtype=np.uint8), count=grid.count).astype(np.bool_),
    )
