"""Models with an adapter applied to them, as inputs of a merge."""

import json
from types import MappingProxyType

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.adapter import Adapter
from mergefs.checkpoint.adapter_fit import Fit, fit_adapter
from mergefs.checkpoint.adapter_names import Outline
from mergefs.errors import CheckpointError
from mergefs.planner.plan import InputModel
from mergefs.sources.adapted import adapted_tensors
from mergefs.sources.place import Place, Role
from mergefs.statistics.identity import checkpoint_identity, composed_identity, digest, structure_identity


def with_adapter(model: InputModel, adapter: Adapter, role: Role, catalog: Catalog) -> InputModel:
    """Return ``model`` with ``adapter`` applied; nothing is computed before it is read.

    ``role`` says who pays for the bytes of the adapter. Raises CheckpointError where something of the adapter has no
    place in the model.
    """
    shapes = {name: place.shape for name, place in model.tensors.items()}
    fit = fit_adapter(adapter, Outline(model.title, shapes, model.config, model.ties_embeddings))
    for name in fit.changes:
        place = model.tensors.get(name)
        if place is not None and not place.dtype.is_float:
            raise CheckpointError(
                f"{adapter.path} changes {place.describe()}, which is {place.dtype.name}, and only floating-point "
                "tensors can be adapted; apply the adapter to the model that it was trained on"
            )
    tensors = adapted_tensors(model.tensors, fit, adapter.shards[0], role)
    config, files = model.config, model.files
    if fit.untied is not None:
        config = MappingProxyType({**config, "tie_word_embeddings": False})
        content = (json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n").encode()
        files = MappingProxyType({**files, "config.json": content})
    structure = _structure(model, adapter, tensors, fit)
    return InputModel(
        title=f"{model.title}+{adapter.path}",
        tensors=MappingProxyType(tensors),
        config=config,
        files=files,
        sources=(*model.sources, adapter),
        identity=composed_identity(structure, (model.identity, checkpoint_identity(adapter, catalog))),
        structure=structure,
        adapted=model,
        merged=model.merged,
        made_by=model.made_by,
    )


def _structure(model: InputModel, adapter: Adapter, tensors: dict[str, Place], fit: Fit) -> str:
    """Return the structure of the result: that of the model and of the adapter, and how the one changes the other."""
    found: list[bytes | str | int] = ["adapted", model.structure, structure_identity(adapter)]
    for texts in (sorted(fit.changes), fit.untied or ()):
        found += [len(texts), *texts]
    for name in sorted(fit.changes):
        formulas = _formulas(tensors[name])
        found += [len(formulas), *formulas]
    return digest(*found).hex()


def _formulas(place: Place) -> list[bytes]:
    """Return how a tensor is computed, from the last step to the first, and the names of what is stored."""
    names = [stored.tensor.name.encode() for stored in place.stored()] if not place.parts else []
    return [place.formula, *names, *(formula for part in place.parts for formula in _formulas(part))]
