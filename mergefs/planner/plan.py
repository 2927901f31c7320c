"""What a plan is. Everything here is immutable; the engine computes bytes from it and from nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.checkpoint.configuration import number_of_layers, ties_embeddings
from mergefs.checkpoint.dtypes import DType
from mergefs.checkpoint.source import AuxiliaryFile, SourceFile
from mergefs.methods.contract import Method, TensorContext
from mergefs.planner.ancestry import Ancestry
from mergefs.planner.levels import WHOLE, Coded, Selection
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan_ids import asked
from mergefs.recipe.definition import Recipe
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Place, Role, StoredTensor

FileContent: TypeAlias = AuxiliaryFile | bytes
"""A file of a model's directory: one that lies there, or the bytes of a generated one."""


@dataclass(frozen=True, slots=True, eq=False)
class InputModel:
    """A model that a recipe names, opened. Nothing but headers and small files has been read.

    ``title`` names it in messages. ``tensors`` are sorted by name. ``files`` is what its directory has beside the
    weights, by name: files, or the bytes of generated ones. ``sources`` are the directories that its bytes come from.
    ``identity`` is that of its contents once they are known, else a local one; ``structure`` is a hash of what headers
    and recipes tell of it, the same on every machine. ``adapted`` is the model that the adapter in the last of the
    ``sources`` is applied to, ``merged`` the plan of a model that is itself the result of a merge, of the same recipe
    file; ``made_by`` is the merge that has written its directory.
    """

    title: str
    tensors: Mapping[str, Place]
    config: Mapping[str, Any]
    files: Mapping[str, FileContent]
    sources: tuple[WeightSource, ...]
    identity: str
    structure: str
    adapted: "InputModel | None" = None
    merged: "MergePlan | None" = None
    made_by: Ancestry | None = None

    @property
    def number_of_layers(self) -> int | None:
        """The number of layers (of the text model, where there are several), or None when config.json is silent."""
        return number_of_layers(self.config)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        return ties_embeddings(self.config, self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class PlanInput:
    """One model of the recipe, opened, and how it takes part."""

    reference: str
    model: InputModel
    role: Role

    @property
    def identity(self) -> str:
        """The identity of the model's contents once known, else the local one."""
        return self.model.identity


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlan:
    """How one tensor of the merged model comes to be.

    ``places`` says where the tensor lies in each input of the merge, ``stand_in`` where the bytes of a block that is
    not bought come from (the base, or what ``--base`` names). ``method`` and ``context`` are None for tensors that are
    copied from ``places[0]`` (integers, masks), which those ``alike`` must equal. ``selection`` is None when everything
    is read. ``coded`` has, for each input that levels of the selection may buy planes of, its delta in planes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    compute: DType
    places: tuple[Place, ...]
    roles: tuple[Role, ...]
    stand_in: Place | None
    method: Method[Any] | None
    context: TensorContext | None
    alike: tuple[Place, ...] = ()
    selection: Selection | None = None
    coded: tuple[Coded | None, ...] = ()

    @property
    def grid(self) -> BlockGrid:
        """The blocks that the tensor is computed by."""
        return BlockGrid.of(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the merged tensor."""
        return self.grid.size * self.dtype.itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes that reading all of this tensor takes from experts."""
        return sum(place.total_bytes_read(Role.EXPERT) for place in self.places)

    @property
    def base_bytes(self) -> int:
        """Bytes that one full read takes from the base."""
        return self._stand_in_bytes(Role.BASE) + sum(
            self.planned_bytes(index, Role.BASE) for index in range(len(self.places))
        )

    @property
    def planned_expert_bytes(self) -> int:
        """Bytes that one full read takes from the experts."""
        if self.selection is None:
            return self.expert_bytes
        return self._stand_in_bytes(Role.EXPERT) + sum(
            self.planned_bytes(index, Role.EXPERT) for index in range(len(self.places))
        )

    def planned_bytes(self, index: int, role: Role = Role.EXPERT) -> int:
        """Bytes of files of ``role`` that one full read takes for the input at ``index``."""
        place, selection = self.places[index], self.selection
        if selection is None:
            return place.total_bytes_read(role)
        levels = selection.paid(index)
        if not place.divisible:
            return place.total_bytes_read(role) if (levels == WHOLE).any() else 0
        total = int(place.bytes_read(selection.cells, role)[levels == WHOLE].sum())
        coded = self.coded[index] if self.coded and role is Role.EXPERT else None
        if coded is not None:
            for level in range(1, coded.planes + 1):
                total += int(coded.bytes_read(level)[levels == level].sum())
        return total

    def stored(self) -> Iterator[StoredTensor]:
        """Yield every tensor in a file that it is computed from."""
        for place in self.places:
            yield from place.stored()

    def prepare(self) -> None:
        """Let every place gather what reading it needs to know of whole tensors."""
        for place in self.places:
            place.prepare()
        if self.stand_in is not None and self.selection is not None:
            self.stand_in.prepare()

    def _stand_in_bytes(self, role: Role) -> int:
        """Bytes that one full read takes from a stand-in that is not itself an input."""
        if self.selection is None or self.stand_in is None or Role.BASE in self.roles or self.context is None:
            return 0
        return int(self.stand_in.bytes_read(self.grid, role)[self.selection.leaning].sum())


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the merged model: its header bytes, and its tensors in order of offset."""

    name: str
    header: bytes
    tensors: tuple[str, ...]
    offsets: tuple[int, ...]  # of each tensor, from the start of the file
    size: int


@dataclass(frozen=True, slots=True)
class BudgetOutcome:
    """What a plan costs and what it leaves out. Bytes, and Euclidean norms over all elements of the model.

    ``merged_delta_norm`` is what the full merge is expected to differ from the base by, None where nothing was left out
    and so nothing had to be known. The predicted relative error is the expected norm of what the budget changes,
    divided by it: from norms and angles of the deltas ("gram"), or from blocks that were merged both ways: all of them
    ("exact", which it is too where nothing is left out) or a sample, with its standard error. ``error_bound`` is a norm
    that the budget changes the merge by at most, None where nothing is certain.
    """

    budget_bytes: int | None
    expert_bytes_total: int
    expert_bytes_planned: int
    base_bytes: int
    output_bytes: int
    blocks_total: int
    blocks_selected: int
    predicted_relative_error: float
    predicted_by: Literal["exact", "gram", "sampled"]
    predicted_standard_error: float | None
    error_bound: float | None
    error_bound_relative: float | None
    merged_delta_norm: float | None


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """The whole merged model as a plan.

    ``config`` is the content of its config.json, None where the donor's file stays as it is. ``companions`` are the
    files beside the weights that come from models, tokenizer included, by name; ``tokenizer`` identifies what the
    recipe changes in them.
    """

    plan_id: str
    recipe: Recipe
    method: Method[Any]
    inputs: tuple[PlanInput, ...]
    stand_in: PlanInput | None
    donor: InputModel
    config: Mapping[str, Any] | None
    companions: Mapping[str, FileContent]
    tokenizer: str | None
    tensors: Mapping[str, TensorPlan]
    files: tuple[OutputFile, ...]
    outcome: BudgetOutcome
    options: PlanOptions
    notes: tuple[str, ...]
    created_ns: int

    @property
    def asked(self) -> str:
        """The half of the id that is the same on every machine, whatever is known of the inputs."""
        return asked(self.plan_id)

    @property
    def all_inputs(self) -> tuple[PlanInput, ...]:
        """The inputs of the recipe, and the stand-in for what is not bought where it is not one of them."""
        return self.inputs if self.stand_in is None else (*self.inputs, self.stand_in)

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """Every directory that bytes come from, each once."""
        found = (source for entry in self.all_inputs for source in entry.model.sources)
        return tuple({id(source): source for source in found}.values())

    @property
    def plane_files(self) -> tuple[SourceFile, ...]:
        """Every file of delta planes that bytes come from, each once."""
        coded = (one for tensor in self.tensors.values() for one in tensor.coded if one is not None)
        return tuple({one.file.path: one.file for one in coded}.values())

    @property
    def nested(self) -> tuple["MergePlan", ...]:
        """The plans of inputs that are themselves merged."""
        return tuple(entry.model.merged for entry in self.all_inputs if entry.model.merged is not None)
