"""The identity of a plan: a hash of everything that its bytes depend on, and of nothing else."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from blake3 import blake3

from mergefs.methods.plugins import Origin
from mergefs.planner.levels import EQUAL, NOTHING
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import PlanInput, TensorPlan
from mergefs.recipe.definition import Recipe
from mergefs.recipe.settings import Settings

_LOCAL = "local-"


def plan_identity(
    recipe: Recipe,
    inputs: Sequence[PlanInput],
    stand_in: PlanInput | None,
    tensors: Sequence[TensorPlan],
    budget_bytes: int | None,
    options: PlanOptions,
    method_origin: Origin | None,
    tokenizer: str | None,
) -> str:
    """Return the plan's id; it starts with ``local-`` while the contents of an input are not known.

    The path of a model is not part of it. The budget is, beside the blocks that it buys, since the model tells it; and
    so is the package that a method comes from, where that is not ours. ``tokenizer`` identifies a merged one.
    """
    everything = [*inputs, *([stand_in] if stand_in else [])]
    content = {
        "format": 5,
        "method": recipe.method,
        "dtype": recipe.dtype.name if recipe.dtype else None,
        "out_dtype": recipe.out_dtype.name if recipe.out_dtype else None,
        "parameters": _plain(recipe.parameters),
        "models": [
            {"identity": entry.identity, "role": entry.role.value, "architecture": listed.model.architecture}
            for entry, listed in zip(inputs, recipe.inputs(), strict=True)
        ],
        "modules": _structure(recipe),
        "stand_in": stand_in.identity if stand_in else None,
        "budget_bytes": budget_bytes,
        **options.recorded(),
        "selection": _selection_digest(tensors),
    }
    if method_origin is not None:
        content["method_origin"] = str(method_origin)
    if tokenizer is not None:
        content["tokenizer"] = tokenizer
    digest = blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=16)
    local = any(entry.identity.startswith(_LOCAL) for entry in everything)
    return (_LOCAL if local else "") + digest


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
