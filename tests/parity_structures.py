"""Every method in every form that a recipe can have: slices, modules, merges of merges, vocabularies, adapters, dtypes.

The merges are those of ``examples.METHODS``, one for each method; here their recipes are written in another form.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from examples import METHODS
from oracle import mergekit_merge, mergekit_multi, nothing_left_to_chance
from parity_cases import DTYPES
from parity_claims import claim
from parity_comparison import Difference, difference
from recipes import Merge
from tensors import Tensors, merge_by_mergefs
from tokenizers_oracle import exact_padding, orders_fixed
from worlds import LAYERS, World, make_world

Documents = list[dict[str, Any]]
"""The documents of a recipe, the result last."""


def _plain(world: World, merge: Merge, first: str | None = None) -> dict[str, Any]:
    """Return the recipe in its usual form, with another model for the first expert where one is given."""
    experts = [first or str(world.first), str(world.second)]
    models = [
        {"model": model, "parameters": dict(parameters)}
        for model, parameters in zip(experts, merge.per_expert, strict=False)
    ]
    document: dict[str, Any] = {"merge_method": merge.method, "models": models, "parameters": dict(merge.parameters)}
    return document | ({"base_model": str(world.base)} if merge.with_base else {})


def _slices(world: World, merge: Merge) -> Documents:
    """Two slices that overlap, so that layers come twice and are numbered anew; the second has its own parameters."""
    document = _plain(world, merge)
    sources = [{"model": str(world.base)}] * merge.with_base + document.pop("models")
    first, second = ([{**source, "layer_range": part} for source in sources] for part in ([0, LAYERS - 1], [1, LAYERS]))
    return [document | {"slices": [{"sources": first}, {"sources": second, "parameters": document["parameters"]}]}]


def _module(world: World, merge: Merge) -> Documents:
    document = _plain(world, merge)
    return [document | {"modules": {"default": {"models": document.pop("models")}}}]


def _merge_of_a_merge(world: World, merge: Merge) -> Documents:
    inner = {
        "name": "inner",
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in (world.first, world.second)],
    }
    return [inner, _plain(world, merge, "inner")]


def _vocabulary(world: World, merge: Merge) -> Documents:
    return [_plain(world, merge, str(world.foreign)) | {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}}]


def _adapter(world: World, merge: Merge) -> Documents:
    return [_plain(world, merge, world.adapted)]


def _other_dtypes(world: World, merge: Merge) -> Documents:
    return [_plain(world, merge) | {"dtype": "float32", "out_dtype": "bfloat16"}]


STRUCTURES: Final[Mapping[str, Callable[[World, Merge], Documents]]] = {
    "slices": _slices,
    "a module by its name": _module,
    "a merge of a merge": _merge_of_a_merge,
    "the union of vocabularies, padded": _vocabulary,
    "a model with an adapter": _adapter,
    "float32 inside, bfloat16 outside": _other_dtypes,
}

Worlds = Callable[[str], World]


def worlds_below(directory: Path) -> Worlds:
    """Return a function that writes the models of a dtype once."""
    return lru_cache(maxsize=None)(partial(_world_below, directory))


def _world_below(directory: Path, dtype: str) -> World:
    return make_world(directory / f"world-{dtype}", DTYPES[dtype])


@contextlib.contextmanager
def _nothing_left_to_chance(method: str) -> Iterator[None]:
    with nothing_left_to_chance(method), orders_fixed(), exact_padding():
        yield


def compare(structure: str, method: str, world: World, directory: Path) -> Difference:
    """Return how a merge in some form differs from mergekit's with nothing left to chance.

    Tokenizers are built in this process if ``service.run_builder`` is replaced.
    """
    documents = STRUCTURES[structure](world, METHODS[method])
    ours = merge_by_mergefs(directory, documents if len(documents) > 1 else documents[0])
    with _nothing_left_to_chance(method), tempfile.TemporaryDirectory() as adapted:
        if len(documents) > 1:
            theirs = mergekit_multi(documents)
        else:
            theirs = mergekit_merge(documents[0], lora_merge_cache=adapted, copy_tokenizer=True)
    return difference(ours, _narrowed(method, ours, theirs), [])


def _narrowed(method: str, ours: Tensors, theirs: Tensors) -> Tensors:
    """Return mergekit's tensors, rounded to the dtypes of ours where the method ends in float32 in mergekit."""
    assert ours.keys() == theirs.keys()
    if not claim(method).widened:
        return theirs
    return {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
