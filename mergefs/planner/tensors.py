"""Which tensors the merged model has, and where each comes from.

In every group of tensors one input (the base, or without one the first) decides which there are. Every input must have
all of them, but for what can be rebuilt from something else: the output embedding of a model that ties it to the input
embedding, and buffers that are computed from config.json; and but for biases, which models of one architecture may
have or not.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType, promote
from mergefs.errors import PlanError, RecipeError
from mergefs.methods.contract import FewModels, Method, TensorContext
from mergefs.methods.registry import get_method
from mergefs.planner.assembly import Assembly, Group, Models
from mergefs.planner.plan import InputModel, PlanInput, TensorPlan
from mergefs.planner.vocabulary import Alignment, has_row_for_each_token
from mergefs.recipe.definition import Recipe
from mergefs.recipe.parameters import Values, resolve_parameters
from mergefs.recipe.references import ModelReference
from mergefs.sources.place import Place, Role

_OUTPUT_EMBEDDING: Final = ("lm_head.weight", "embed_out.weight")
_INPUT_EMBEDDING: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_NUMBER: Final = re.compile("([0-9]+)")
_COMPUTED_BUFFER: Final = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$"
)
_OPTIONAL: Final = re.compile(r"(^|[._])bias$")


@dataclass(frozen=True, slots=True)
class Planned:
    """The tensors of the merged model in their order, notes worth telling, and all names that filters may select."""

    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]
    names: frozenset[str]


class TensorPlanner:
    """Plans the tensors of one recipe, whose models have been opened."""

    def __init__(
        self,
        recipe: Recipe,
        models: Models,
        stand_in: PlanInput | None,
        donor: InputModel,
        random_seed: int,
        alignment: Alignment,
    ) -> None:
        self._recipe = recipe
        self._method = get_method(recipe.method)
        self._models = models
        self._stand_in = stand_in
        self._donor = donor
        self._seed = random_seed
        self._alignment = alignment
        self._notes: list[str] = []
        self._remarks: dict[str, list[str]] = {}

    def plan(self, assembly: Assembly) -> Planned:
        """Return a plan for every tensor.

        They are in the order of their names, with numbers in them as numbers: neither the files of the merged model
        nor what a budget buys depend on how the donor is sharded.

        Raises PlanError for tensors that are missing or of another shape, RecipeError for parameters that do not fit.
        """
        planned: dict[str, TensorPlan] = {}
        names: set[str] = set()
        for group in assembly.groups:
            for tensor in _GroupPlanner(self, group).plan():
                planned[tensor.name] = tensor
            for given in group.names:
                names.update(given.keys(), given.values())
        for name in assembly.unlisted:
            planned[name] = self.copied(name, [self._donor.tensors[name]], 0)
            self.note(f"{name}: copied from {self._donor.title}, because no module of the recipe has it")
        for text, concerned in self._remarks.items():
            others = f" (and {len(concerned) - 1} more)" if len(concerned) > 1 else ""
            self.note(f"{concerned[0]}{others}: {text}")
        in_order = sorted(planned, key=lambda name: (_natural_order(name), name))
        return Planned(tuple(planned[name] for name in in_order), tuple(dict.fromkeys(self._notes)), frozenset(names))

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self._recipe

    @property
    def method(self) -> Method[Any]:
        """The method that merges."""
        return self._method

    @property
    def donor(self) -> InputModel:
        """The model whose config.json the merged model gets."""
        return self._donor

    @property
    def random_seed(self) -> int:
        """The seed of methods that drop at random."""
        return self._seed

    @property
    def alignment(self) -> Alignment:
        """Makes tensors with a row for each token fit together."""
        return self._alignment

    def model(self, reference: ModelReference) -> InputModel:
        """Return an opened model."""
        return self._models[reference]

    def remark(self, text: str, name: str) -> None:
        """Keep what a method says of the parameters of a tensor; of many tensors it is told once."""
        self._remarks.setdefault(text, []).append(name)

    def note(self, text: str) -> None:
        """Keep something that is worth telling."""
        self._notes.append(text)

    def stand_in(self, input_name: str, like: Place, compute: DType) -> Place | None:
        """Return what stands in for bytes of a tensor of no base that are not bought."""
        place = None if self._stand_in is None else find_tensor(self._stand_in.model, input_name)
        if place is not None:
            place = self._alignment.align_stand_in(input_name, place, like, compute)
        return place if place is not None and place.shape == like.shape else None

    def copied(self, name: str, places: Sequence[Place], base: int | None) -> TensorPlan:
        """Return the plan of a tensor that is copied as it is, and that all places must have alike."""
        first = places[0 if base is None else base]
        stand_in = None if self._stand_in is None else self._stand_in.model.tensors.get(name)
        if stand_in is not None and (stand_in.dtype, stand_in.shape) != (first.dtype, first.shape):
            stand_in = None
        return TensorPlan(
            name=name,
            shape=first.shape,
            dtype=first.dtype,
            compute=first.dtype,
            places=(first,),
            roles=(Role.EXPERT if base is None else Role.BASE,),
            stand_in=stand_in,
            method=None,
            context=None,
            alike=tuple(place for place in places if place is not first),
        )


class _GroupPlanner:
    """Plans the tensors of one group."""

    def __init__(self, planner: TensorPlanner, group: Group) -> None:
        self._planner = planner
        self._group = group
        self._entries = group.part.inputs()
        self._models = [planner.model(entry.model) for entry in self._entries]
        self._base = next((i for i, entry in enumerate(self._entries) if entry.model == group.part.base), None)
        self._reference = self._models[group.reference]

    def plan(self) -> list[TensorPlan]:
        """Return the plans of all tensors."""
        expected = dict(self._group.names[self._group.reference])
        for name in _untied(self._group.names, self._reference, self._planner.donor):
            expected.setdefault(name, name)
        for name in self._optional_extras(expected):
            expected.setdefault(name, name)
        self._refuse_extra_tensors(expected)
        tied = self._planner.donor.ties_embeddings
        return [
            self._tensor(name)
            for name in expected
            if not (tied and name.endswith(_OUTPUT_EMBEDDING) and name not in self._planner.donor.tensors)
        ]

    def _tensor(self, name: str) -> TensorPlan:
        """Return the plan of one tensor, from all inputs that have it."""
        input_names = [given.get(name, name) for given in self._group.names]
        found = [
            find_tensor(model, given.get(name, name)) if name in given or _can_be_tied(name) else None
            for model, given in zip(self._models, self._group.names, strict=True)
        ]
        present = [index for index, place in enumerate(found) if place is not None]
        places = [place for place in found if place is not None]
        places = self._aligned(name, present, places)
        like = places[present.index(self._group.reference)] if self._group.reference in present else places[0]
        for place in places:
            check_shape(place, like, name)
        base = present.index(self._base) if self._base in present else None
        if len(present) < len(found):
            missing = next(model for model, place in zip(self._models, found, strict=True) if place is None)
            if _COMPUTED_BUFFER.search(name):
                self._planner.note(f"{name}: copied from {self._reference.title}, because {missing.title} has none")
                return self._planner.copied(name, [like], 0 if base is not None else None)
            instead = self._with_missing(name, present, places, base, missing)
            if instead is not None:
                return self._merged(name, input_names, *instead)
        dtypes = [place.dtype for place in places]
        if not all(dtype.is_float for dtype in dtypes):
            if len(set(dtypes)) > 1:
                raise PlanError(
                    f"tensor {name!r} is {dtypes[0].name} in {self._models[0].title} and has another type in another "
                    "model; tensors that are not floating-point must agree"
                )
            return self._planner.copied(name, places, base)
        return self._merged(name, input_names, present, places, self._planner.method)

    def _aligned(self, name: str, present: Sequence[int], places: Sequence[Place]) -> list[Place]:
        """Return the places of the inputs at ``present`` with the rows of the merged vocabulary."""
        compute = self._planner.recipe.dtype or _promoted([place.dtype for place in places])
        references = [self._entries[index].model for index in present]
        try:
            return list(self._planner.alignment.align(name, references, places, self._group.part.base, compute))
        except PlanError as error:
            raise PlanError(f"tensor {name!r}: {error}") from error

    def _with_missing(
        self, name: str, present: list[int], places: list[Place], base: int | None, missing: InputModel
    ) -> tuple[list[int], list[Place], Method[Any]] | None:
        """Return inputs and method for a tensor that ``missing`` lacks, None where those that have it are merged."""
        specification = self._planner.method.specification
        experts = len(present) - (base is not None)
        enough = (
            len(present) >= specification.min_models
            and experts >= specification.min_experts
            and (self._base is None or base is not None)
        )
        few = specification.few_models
        lone = len(present) == 1 and (few is FewModels.TAKE_ONE or (base is not None and few is not FewModels.REFUSED))
        if _OPTIONAL.search(name) and (
            lone or (few is FewModels.FALL_BACK_ON_BASE and base is not None and not enough)
        ):
            index = base or 0
            self._planner.note(
                f"{name}: taken from {self._models[present[index]].title}, since {missing.title} has none"
            )
            return [present[index]], [places[index]], get_method("passthrough")
        if _OPTIONAL.search(name) and enough:
            self._planner.note(f"{name}: merged without {missing.title}, which has none")
            return None
        raise PlanError(
            f"{missing.title} lacks tensor {name!r}, which {self._models[present[0]].title} has; only biases, the "
            "output "
            "embedding of a model with tied embeddings and buffers computed from config.json (rotary inv_freq, "
            "position_ids, attention masks) may be missing, as far as the method can do without; complete the model, "
            "or leave it out"
        )

    def _merged(
        self,
        name: str,
        input_names: Sequence[str],
        present: Sequence[int],
        places: Sequence[Place],
        method: Method[Any],
    ) -> TensorPlan:
        """Return the plan of a tensor that is computed by ``method`` from the inputs at ``present``."""
        recipe, planner = self._planner.recipe, self._planner
        compute = recipe.dtype or _promoted([place.dtype for place in places])
        base = present.index(self._base) if self._base is not None and self._base in present else None
        shared: Values = {}
        per_model: tuple[Values, ...] = ({"scale": None},)
        if method is planner.method:
            resolved = resolve_parameters(
                recipe,
                method.specification,
                name,
                self._group.position(name),
                self._group.module,
                self._group.part,
                input_names,
            )
            shared, per_model = resolved.shared, tuple(resolved.per_model[index] for index in present)
        context = TensorContext(
            name=name,
            size=places[0].elements,
            row=max(1, places[0].shape[-1] if places[0].shape else 1),
            columns=max(1, math.prod(places[0].shape[1:])),
            compute=compute,
            base=base,
            models=len(places),
            shared=shared,
            per_model=per_model,
            seed=planner.random_seed,
        )
        try:
            with np.errstate(all="ignore"):
                method.check(context)
        except RecipeError as error:
            raise RecipeError(f"{recipe.origin}: {error}") from error
        for remark in method.remarks(context):
            planner.remark(remark, name)
        return TensorPlan(
            name=name,
            shape=places[0].shape,
            dtype=recipe.out_dtype or compute,
            compute=compute,
            places=tuple(places),
            roles=tuple(Role.BASE if index == base else Role.EXPERT for index in range(len(places))),
            stand_in=planner.stand_in(input_names[present[0]], places[0], compute) if base is None else places[base],
            method=method,
            context=context,
        )

    def _optional_extras(self, expected: Mapping[str, str]) -> list[str]:
        """Return biases that the reference lacks and that the method can do without it."""
        extras = {name for given in self._group.names for name in given if name not in expected}
        specification = self._planner.method.specification
        wanted = []
        for name in sorted(filter(_OPTIONAL.search, extras)):
            present = sum(name in given for given in self._group.names)
            alone = present == 1 and specification.few_models is FewModels.TAKE_ONE
            if alone or (self._base is None and present >= specification.min_models):
                wanted.append(name)
        return wanted

    def _refuse_extra_tensors(self, expected: Mapping[str, str]) -> None:
        """Refuse tensors that the reference lacks, but for those that can be rebuilt: a note says they are left out."""
        for model, given in zip(self._models, self._group.names, strict=True):
            for name in given:
                if name in expected:
                    continue
                if name.endswith(_OUTPUT_EMBEDDING) and self._planner.donor.ties_embeddings:
                    self._planner.note(
                        f"{name} of {model.title} is left out: {self._planner.donor.title} ties its embeddings, and so "
                        "does the merged model"
                    )
                elif not _COMPUTED_BUFFER.search(name):
                    raise PlanError(
                        f"{model.title} has tensor {given[name]!r}, which {self._reference.title} lacks, so there is "
                        "nothing to merge it with; remove the tensor, or merge models of one architecture"
                    )


def _untied(names: Sequence[Mapping[str, str]], reference: InputModel, donor: InputModel) -> list[str]:
    """Return output embeddings that the merged model has although the reference ties its own to the input embedding."""
    if donor.ties_embeddings or not reference.ties_embeddings:
        return []
    return [name for given in names for name in given if name.endswith(_OUTPUT_EMBEDDING)]


def _can_be_tied(name: str) -> bool:
    return name.endswith(_OUTPUT_EMBEDDING)


def find_tensor(model: InputModel, name: str) -> Place | None:
    """Return the tensor ``name``, or for a tied output embedding the input embedding that it is."""
    found = model.tensors.get(name)
    if found is None and name.endswith(_OUTPUT_EMBEDDING) and model.ties_embeddings:
        return next((place for other, place in model.tensors.items() if other.endswith(_INPUT_EMBEDDING)), None)
    return found


def check_shape(place: Place, like: Place, name: str) -> None:
    """Refuse a tensor of another shape than that of ``like``."""
    if place.shape != like.shape:
        raise PlanError(
            f"tensor {name!r} is {list(place.shape)} in {place.describe()} and {list(like.shape)} in "
            f"{like.describe()}, "
            "and models can be merged only when all shapes agree; "
            + (
                "add `tokenizer: {source: base}` to the recipe, which makes vocabularies agree"
                if has_row_for_each_token(name)
                else "leave out the model that differs"
            )
        )


def _natural_order(name: str) -> list[str | int]:
    """Return a key that sorts layer 10 after layer 2."""
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(name)]


def _promoted(dtypes: Sequence[DType]) -> DType:
    """Return the type that all inputs convert to."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = promote(result, dtype)
    return result
