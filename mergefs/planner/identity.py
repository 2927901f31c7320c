"""The id of a plan: what is asked, the same on every machine, and what the inputs hold, as far as that is known."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from blake3 import blake3

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.methods.plugins import Origin
from mergefs.planner.contents import Contents, InputContents
from mergefs.planner.levels import EQUAL, NOTHING
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import InputModel, MergePlan, PlanInput, TensorPlan
from mergefs.planner.plan_ids import ASKED_DIGITS
from mergefs.recipe.definition import Recipe
from mergefs.recipe.settings import Settings
from mergefs.statistics.identity import checkpoint_identity, composed_identity, digest, is_local, plan_id

IDS: Final = "6"
"""The format of ids. One of another format cannot come out the same again."""


def asked_identity(
    recipe: Recipe,
    inputs: Sequence[PlanInput],
    stand_in: PlanInput | None,
    tensors: Sequence[TensorPlan],
    budget_bytes: int | None,
    options: PlanOptions,
    method_origin: Origin | None,
    tokenizer: str | None,
) -> str:
    """Return the half of a plan's id that says what is asked: everything that its bytes depend on but the contents.

    Paths of models are not part of it, nor whatever differs between machines or with what the catalog knows. The budget
    is, beside the blocks that it buys, since the model tells it; and so is the package that a method comes from, where
    that is not ours. ``tokenizer`` identifies a merged one.
    """
    content = {
        "format": IDS,
        "method": recipe.method,
        "dtype": recipe.dtype.name if recipe.dtype else None,
        "out_dtype": recipe.out_dtype.name if recipe.out_dtype else None,
        "parameters": _plain(recipe.parameters),
        "models": [
            {"structure": entry.model.structure, "role": entry.role.value, "architecture": listed.model.architecture}
            for entry, listed in zip(inputs, recipe.inputs(), strict=True)
        ],
        "modules": _structure(recipe),
        "stand_in": stand_in.model.structure if stand_in else None,
        "budget_bytes": budget_bytes,
        **options.recorded(),
        "selection": _selection_digest(tensors),
    }
    if method_origin is not None:
        content["method_origin"] = str(method_origin)
    if tokenizer is not None:
        content["tokenizer"] = tokenizer
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=ASKED_DIGITS // 2)


def identity_of(model: InputModel, of: Callable[[WeightSource], str]) -> str:
    """Return the identity of a model where ``of`` gives those of the directories that it comes from."""
    if model.adapted is not None:
        return composed_identity(model.structure, (identity_of(model.adapted, of), of(model.sources[-1])))
    if model.merged is not None:
        return plan_id(model.structure, [identity_of(entry.model, of) for entry in model.merged.all_inputs])
    return of(model.sources[0])


def known_identity(model: InputModel, catalog: Catalog) -> str:
    """Return the identity of a model by its contents where the catalog knows them by now, else a local one."""
    return identity_of(model, partial(checkpoint_identity, catalog=catalog))


def identified(plan: MergePlan, catalog: Catalog) -> MergePlan:
    """Return a plan, with an id that says what its inputs hold, as far as the catalog knows that by now."""

    def known(entry: PlanInput) -> PlanInput:
        return replace(entry, model=replace(entry.model, identity=known_identity(entry.model, catalog)))

    inputs = tuple(map(known, plan.inputs))
    stand_in = None if plan.stand_in is None else known(plan.stand_in)
    found = replace(plan, inputs=inputs, stand_in=stand_in)
    return replace(found, plan_id=plan_id(plan.asked, [entry.identity for entry in found.all_inputs]))


def known_contents(plan: MergePlan, catalog: Catalog) -> Contents:
    """Return what the catalog knows by now of the contents of a plan's inputs."""

    def known(entry: PlanInput) -> InputContents:
        identity, merged = known_identity(entry.model, catalog), entry.model.merged
        inner = () if merged is None else known_contents(merged, catalog).inputs
        return InputContents(entry.reference, "" if is_local(identity) else identity, inner)

    stand_in = None if plan.stand_in is None else known(plan.stand_in)
    return Contents(tuple(map(known, plan.inputs)), stand_in)


def files_identity(inputs: Iterable[PlanInput]) -> str:
    """Return what the files of all ``inputs`` are, as long as nobody writes to them; it holds on this machine only."""
    return digest("files", *(identity_of(one.model, lambda source: source.local_identity) for one in inputs)).hex()


def _structure(recipe: Recipe) -> list[dict[str, Any]]:
    """Return what is merged as JSON types; models are numbers in the order of ``recipe.inputs()``."""
    number = {entry.model: index for index, entry in enumerate(recipe.inputs())}
    return [
        {
            "name": module.name,
            "parameters": _plain(module.parameters),
            "slices": [
                {
                    "base": number.get(part.base) if part.base else None,
                    "parameters": _plain(part.parameters),
                    "sources": [
                        {
                            "model": number[source.model],
                            "layers": source.layers,
                            "parameters": _plain(source.parameters),
                        }
                        for source in part.inputs()
                    ],
                }
                for part in module.slices
            ],
        }
        for module in recipe.modules
    ]


def _plain(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON types, with the kind of each so that no two mean the same text."""
    return {
        name: {type(value).__name__: dataclasses.asdict(value)} if dataclasses.is_dataclass(value) else value
        for name, value in settings.items()
    }


def _selection_digest(tensors: Sequence[TensorPlan]) -> str | None:
    """Return a hash of what is bought, None where that is everything."""
    if all(tensor.selection is None or tensor.selection.complete for tensor in tensors):
        return None
    hasher = blake3()
    for tensor in tensors:
        hasher.update(tensor.name.encode() + b"\0" + bought_digest(tensor))
    return hasher.hexdigest(length=16)


def bought_digest(tensor: TensorPlan) -> bytes:
    """Return a hash of what is bought of one tensor; nothing where that is everything."""
    selection = tensor.selection
    if selection is None or selection.complete:
        return b""
    hasher = blake3(str(selection.cell).encode() + b"\0")
    hasher.update(selection.levels.tobytes() + selection.computed.tobytes())
    for coded, levels in zip(tensor.coded, selection.levels, strict=False):
        if coded is not None and ((levels != NOTHING) & (levels < EQUAL)).any():
            hasher.update(coded.digest)
    return hasher.digest(length=16)
