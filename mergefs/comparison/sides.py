"""What can be compared: the tensors of a model directory, and those of a plan, computed when they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.engine.engine import Engine
from mergefs.engine.resources import Resources
from mergefs.planner.identity import bought_digest
from mergefs.planner.merged import MergedTensor
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.sources.place import Place, StoredTensor
from mergefs.statistics.identity import digest, tensor_keys


@dataclass(frozen=True, slots=True, eq=False)
class SideTensor:
    """One tensor of a model. Two of the same shape and dtype that share one of their ``keys`` have the same bytes."""

    place: Place
    keys: frozenset[bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of two models: ``title`` names it for people, ``plan_id`` is None for a directory."""

    title: str
    kind: Literal["directory", "plan"]
    plan_id: str | None
    tensors: Mapping[str, SideTensor]


def directory_side(path: Path, catalog: Catalog) -> Side:
    """Open a model directory; reads headers only. Raises the errors of ``open_checkpoint``."""
    checkpoint = open_checkpoint(path)
    places = {name: StoredTensor.of(checkpoint, name) for name in checkpoint.tensors}
    tensors = {name: SideTensor(place, _keys(place, catalog)) for name, place in places.items()}
    return Side(str(checkpoint.path), "directory", None, MappingProxyType(tensors))


def plan_side(plan: MergePlan, resources: Resources) -> Side:
    """Return the merged model of a plan; nothing is computed before it is read."""
    engine = Engine(plan, resources, strict=False)
    engine.prepare()
    title = f"{plan.recipe.origin} (plan {plan.plan_id})"
    places = {name: MergedTensor(title, tensor, engine) for name, tensor in plan.tensors.items()}
    tensors = {name: SideTensor(place, entry_keys(place, resources.catalog)) for name, place in places.items()}
    return Side(title, "plan", plan.plan_id, MappingProxyType(tensors))


def entry_keys(place: MergedTensor, catalog: Catalog) -> frozenset[bytes]:
    """Return keys of a planned tensor: the same for entries that make the same bytes of the same inputs.

    A tensor of which nothing is computed has those of the tensor that it is copied from.
    """
    tensor = place.plan
    original = _original(tensor)
    if original is not None:
        return _keys(original, catalog)
    places = [*tensor.places, *([tensor.stand_in] if tensor.stand_in is not None else [])]
    known = [tensor_keys(place, catalog) for place in places]
    roles = ",".join(role.value for role in tensor.roles)
    bought = bought_digest(tensor)
    both = (tuple(keys[0] for keys in known), tuple(keys[-1] for keys in known))
    return frozenset(digest("entry", place.formula, roles, bought, *keys) for keys in both)


def _original(tensor: TensorPlan) -> Place | None:
    """Return the tensor whose bytes are taken over as they are, or None."""
    if tensor.context is None:
        return tensor.places[0]
    nothing_computed = tensor.selection is not None and not tensor.selection.computed.any()
    if nothing_computed and tensor.stand_in is not None and tensor.stand_in.dtype == tensor.compute == tensor.dtype:
        return tensor.stand_in
    return None


def _keys(place: Place, catalog: Catalog) -> frozenset[bytes]:
    """Return what the catalog knows a place by."""
    return frozenset(tensor_keys(place, catalog))
