"""Which tensors the merged model has, and where each comes from.

The donor (the base, or without one the first model) decides which tensors there are. Every model must have all of
them, but for what can be rebuilt from something else: the output embedding of a model that ties it to the input
embedding, and buffers that are computed from config.json.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from mergefs.checkpoint.checkpoint import Checkpoint, TensorSource
from mergefs.checkpoint.dtypes import DType, promote
from mergefs.errors import PlanError, RecipeError
from mergefs.methods.contract import Method, TensorContext
from mergefs.planner.plan import PlanInput, Role, TensorPlan
from mergefs.recipe.layers import layer_position
from mergefs.recipe.model import Recipe
from mergefs.recipe.parameters import resolve_parameters
from mergefs.statistics.pair import Location

_OUTPUT_EMBEDDING: Final = ("lm_head.weight", "embed_out.weight")
_INPUT_EMBEDDING: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_NUMBER: Final = re.compile("([0-9]+)")
_COMPUTED_BUFFER: Final = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$"
)


def plan_tensors(
    recipe: Recipe,
    method: Method[Any],
    inputs: Sequence[PlanInput],
    stand_in: PlanInput | None,
    donor: Checkpoint,
    random_seed: int,
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    """Return a plan for every tensor of the merged model, and notes worth telling.

    The tensors are in the order of their names, with numbers in them as numbers: neither the files of the merged model
    nor what a budget buys depend on how the donor is sharded.

    Raises PlanError for tensors that are missing or of another shape, RecipeError for parameters that do not fit.
    """
    notes: list[str] = []
    _refuse_extra_tensors(inputs, donor, notes)
    in_order = sorted(donor.tensors.values(), key=lambda tensor: (_natural_order(tensor.name), tensor.name))
    planned = [_plan_tensor(tensor, recipe, method, inputs, stand_in, donor, random_seed, notes) for tensor in in_order]
    return tuple(planned), tuple(dict.fromkeys(notes))


def _natural_order(name: str) -> list[str | int]:
    """Return a key that sorts layer 10 after layer 2."""
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(name)]


def _plan_tensor(
    tensor: TensorSource,
    recipe: Recipe,
    method: Method[Any],
    inputs: Sequence[PlanInput],
    stand_in: PlanInput | None,
    donor: Checkpoint,
    random_seed: int,
    notes: list[str],
) -> TensorPlan:
    """Return the plan of one tensor."""
    found = [_find(entry.checkpoint, tensor.name) for entry in inputs]
    places = [Location(e.checkpoint, f) for e, f in zip(inputs, found, strict=True) if f is not None]
    for place in places:
        _check_shape(place, tensor, donor)
    base_index = next((i for i, entry in enumerate(inputs) if entry.role is Role.BASE), None)
    if any(source is None for source in found):
        missing = next(entry for entry, source in zip(inputs, found, strict=True) if source is None)
        if not _COMPUTED_BUFFER.search(tensor.name):
            raise PlanError(
                f"{missing.checkpoint.path} lacks tensor {tensor.name!r}, which {donor.path} has; only the output "
                "embedding of a model with tied embeddings and buffers computed from config.json (rotary inv_freq, "
                "position_ids, attention masks) may be missing, since they can be rebuilt; complete the model, or "
                "leave it out"
            )
        notes.append(f"{tensor.name}: copied from {donor.path}, because {missing.checkpoint.path} has none")
        return _copied(tensor, donor, inputs, stand_in)
    dtypes = [place.tensor.dtype for place in places]
    if not all(dtype.is_float for dtype in dtypes):
        if len(set(dtypes)) > 1:
            raise PlanError(
                f"tensor {tensor.name!r} is {dtypes[0].name} in {inputs[0].checkpoint.path} and has another type in "
                "another model; tensors that are not floating-point must agree"
            )
        return _copied(tensor, donor, inputs, stand_in)
    compute = recipe.dtype or _promoted(dtypes)
    parameters = resolve_parameters(
        recipe, method.specification, tensor.name, layer_position(tensor.name, donor.number_of_layers)
    )
    context = TensorContext(
        name=tensor.name,
        size=places[0].elements,
        row=max(1, tensor.shape[-1] if tensor.shape else 1),
        compute=compute,
        base=base_index,
        models=len(places),
        shared=parameters.shared,
        per_model=parameters.per_model,
        seed=random_seed,
    )
    method.check(context)
    return TensorPlan(
        name=tensor.name,
        shape=tensor.shape,
        dtype=recipe.out_dtype or compute,
        compute=compute,
        places=tuple(places),
        roles=tuple(entry.role for entry in inputs),
        stand_in=_stand_in(tensor, stand_in, places, base_index),
        context=context,
    )


def _stand_in(
    tensor: TensorSource, stand_in: PlanInput | None, places: Sequence[Location], base_index: int | None
) -> Location | None:
    """Return what stands in for bytes that are not bought."""
    if base_index is not None:
        return places[base_index]
    if stand_in is None:
        return None
    source = _find(stand_in.checkpoint, tensor.name)
    if source is None:
        raise PlanError(f"{stand_in.checkpoint.path} lacks tensor {tensor.name!r}, so it cannot stand in as --base")
    place = Location(stand_in.checkpoint, source)
    _check_shape(place, tensor, places[0].checkpoint)
    return place


def _copied(
    tensor: TensorSource, donor: Checkpoint, inputs: Sequence[PlanInput], stand_in: PlanInput | None
) -> TensorPlan:
    """Return the plan of a tensor that is copied as it is."""
    spare = stand_in.checkpoint.tensors.get(tensor.name) if stand_in is not None else None
    alike = spare is not None and (spare.dtype, spare.shape) == (tensor.dtype, tensor.shape)
    return TensorPlan(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        compute=tensor.dtype,
        places=(Location(donor, tensor),),
        roles=(next(entry.role for entry in inputs if entry.checkpoint is donor),),
        stand_in=Location(stand_in.checkpoint, spare) if stand_in is not None and spare is not None and alike else None,
        context=None,
    )


def _find(checkpoint: Checkpoint, name: str) -> TensorSource | None:
    """Return the tensor ``name``, or for a tied output embedding the input embedding that it is."""
    found = checkpoint.tensors.get(name)
    if found is None and name.endswith(_OUTPUT_EMBEDDING) and checkpoint.ties_embeddings:
        return next((t for t in checkpoint.tensors.values() if t.name.endswith(_INPUT_EMBEDDING)), None)
    return found


def _check_shape(place: Location, tensor: TensorSource, donor: Checkpoint) -> None:
    """Refuse a tensor of another shape than the donor's."""
    if place.tensor.shape != tensor.shape:
        raise PlanError(
            f"tensor {tensor.name!r} is {list(place.tensor.shape)} in {place.checkpoint.path} and {list(tensor.shape)} "
            f"in {donor.path}, and models can be merged only when all shapes agree; leave out the model that differs, "
            "or resize it (a changed vocabulary: resize_token_embeddings of transformers)"
        )


def _promoted(dtypes: Sequence[DType]) -> DType:
    """Return the type that all inputs convert to."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = promote(result, dtype)
    return result


def _refuse_extra_tensors(inputs: Sequence[PlanInput], donor: Checkpoint, notes: list[str]) -> None:
    """Refuse tensors that the donor lacks, but for those that can be rebuilt, which are left out with a note."""
    for entry in inputs:
        for name in entry.checkpoint.tensors:
            if name in donor.tensors:
                continue
            if name.endswith(_OUTPUT_EMBEDDING) and donor.ties_embeddings:
                notes.append(
                    f"{name} of {entry.checkpoint.path} is left out: {donor.path} ties its embeddings, and so does the "
                    "merged model"
                )
            elif not _COMPUTED_BUFFER.search(name):
                raise PlanError(
                    f"{entry.checkpoint.path} has tensor {name!r}, which {donor.path} lacks, so there is nothing to "
                    "merge it with; remove the tensor, or merge models of one architecture"
                )


def require_known_parameters(recipe: Recipe, unmatched: Sequence[str]) -> None:
    """Refuse filters that match no tensor."""
    if unmatched:
        raise RecipeError(
            f"{recipe.origin}: the filter {unmatched[0]!r} matches no tensor; check it against the names of the model"
        )
