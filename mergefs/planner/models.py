"""Opens the models that a recipe names."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mergefs.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergefs.checkpoint.weights import is_adapter
from mergefs.errors import RecipeError
from mergefs.planner.ancestry import Ancestry, UnreadableProvenanceError, read_ancestry
from mergefs.planner.configuration import encode_config
from mergefs.planner.documents import documents
from mergefs.planner.merged import MergedTensor
from mergefs.planner.plan import InputModel, MergePlan, PlanInput
from mergefs.planner.workspace import Workspace
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import find_model
from mergefs.recipe.references import ModelReference, locate
from mergefs.recipe.wording import quote
from mergefs.sources.place import Role, StoredTensor
from mergefs.statistics.identity import checkpoint_identity, structure_identity

if TYPE_CHECKING:
    from mergefs.checkpoint.adapter import Adapter

_OF_THE_MERGE_ALONE: Final = ("README.md", "mergefs.json", "mergekit_config.yml", "model.safetensors.index.json")


class ModelOpener:
    """Opens models, each directory once.

    ``base`` is a model that stands in as the base of recipes that have none. ``merge`` plans a recipe whose result is
    merged by another one.
    """

    def __init__(self, workspace: Workspace, base: ModelReference | None, merge: Callable[[Recipe], MergePlan]) -> None:
        self._workspace = workspace
        self._base = base
        self._merge = merge
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._adapters: dict[Path, Adapter] = {}
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling about the models that were opened."""
        return tuple(self._notes)

    def open(self, reference: ModelReference, recipe: Recipe, role: Role) -> PlanInput:
        """Return the model that ``recipe`` calls ``reference``. Raises the errors of recipes and checkpoints."""
        inner = recipe.inner.get(reference.path)
        model = self._stored(reference, recipe, role) if inner is None else self._merged(inner)
        if reference.adapter is not None:
            path = locate(reference.adapter, recipe.origin, *recipe.directories, kind="adapter")
            model = self._adapted(model, self._adapter(path), role)
        if reference.architecture is not None:
            model = _of_architecture(model, reference.architecture)
        return PlanInput(reference.text, model, role)

    def _stored(self, reference: ModelReference, recipe: Recipe, role: Role) -> InputModel:
        """Open a directory: that of a model, or of an adapter that names the model which it belongs to."""
        path = find_model(reference, recipe).resolve()
        if not is_adapter(path):
            return self._directory(path, recipe, role, alone=reference.adapter is None)
        adapter = self._adapter(path)
        model = self._directory(self._model_of(adapter, recipe), recipe, role, alone=False)
        return self._adapted(model, adapter, role)

    def _directory(self, path: Path, recipe: Recipe, role: Role, alone: bool) -> InputModel:
        """Open a model directory. Unless it is ``alone``, its bytes may be those of the base."""
        checkpoint = self._checkpoints.get(path)
        if checkpoint is None:
            checkpoint = self._checkpoints[path] = open_checkpoint(path)
        payer = Role.BASE if not alone and path in self._base_directories(recipe) else role
        return InputModel(
            title=str(checkpoint.path),
            tensors=MappingProxyType(
                {
                    name: StoredTensor(checkpoint.shards[tensor.shard], tensor, payer)
                    for name, tensor in checkpoint.tensors.items()
                }
            ),
            config=checkpoint.config,
            files=MappingProxyType({file.name: file for file in checkpoint.auxiliary}),
            sources=(checkpoint,),
            identity=checkpoint_identity(checkpoint, self._workspace.catalog),
            structure=structure_identity(checkpoint),
            made_by=self._ancestry(checkpoint.path),
        )

    def _ancestry(self, path: Path) -> Ancestry | None:
        """Return what a model directory was made of; what cannot be read is told of, and harms nothing."""
        try:
            return read_ancestry(path)
        except UnreadableProvenanceError as error:
            note = f"what {path} was made of is unknown, since its mergefs.json cannot be read: {error}"
            self._notes[note] = None
            return None

    def _adapter(self, path: Path) -> "Adapter":
        """Open an adapter."""
        from mergefs.checkpoint.adapter import open_adapter

        resolved = path.resolve()
        adapter = self._adapters.get(resolved)
        if adapter is None:
            adapter = self._adapters[resolved] = open_adapter(resolved)
        return adapter

    def _adapted(self, model: InputModel, adapter: "Adapter", role: Role) -> InputModel:
        from mergefs.planner.adapters import with_adapter

        return with_adapter(model, adapter, role, self._workspace.catalog)

    def _base_directories(self, recipe: Recipe) -> list[Path]:
        """Return the directories of the models that stand in for what is not read."""
        bases = {recipe.base, *recipe.bases} - {None}
        references = bases or {self._base}
        paths = [
            find_model(reference, recipe).resolve()
            for reference in references
            if reference is not None and reference.path not in recipe.inner
        ]
        return [self._model_of(self._adapter(path), recipe) if is_adapter(path) else path for path in paths]

    def _model_of(self, adapter: "Adapter", recipe: Recipe) -> Path:
        """Return the directory of the model that an adapter belongs to.

        That is the one that it names, by a path (relative to the current directory, the recipe's or the one that the
        adapter's is in) or a name on the Hub. Where it is not found, as when the adapter was trained on another
        machine, the base of the recipe takes its place, which a note tells.
        """
        config = adapter.config
        named = None
        if config.base_model is not None:
            revision = f"@{config.base_revision}" if config.base_revision else ""
            named = ModelReference(config.base_model + revision, config.base_model, config.base_revision, None)
            with suppress(RecipeError):
                found = locate(named, recipe.origin, *recipe.directories, adapter.path.parent).resolve()
                if not is_adapter(found):
                    return found
        what = f"{quote(named.text)}, which was not found" if named else "no model"
        base = recipe.base or self._base
        if base is None or base.path in recipe.inner:
            raise RecipeError(
                f"{recipe.origin}: adapter {quote(str(adapter.path))} names {what} as its model; name the model before "
                f"the adapter: MODEL+{adapter.path}"
            )
        directory = find_model(base, recipe).resolve()
        if is_adapter(directory):
            raise RecipeError(
                f"{recipe.origin}: adapter {quote(str(adapter.path))} names {what} as its model, and the base of the "
                f"recipe is an adapter, too; name the model before the adapter: MODEL+{adapter.path}"
            )
        self._notes[f"{adapter.path} is applied to {directory}, the base of the recipe, since it names {what}"] = None
        return directory

    def _merged(self, recipe: Recipe) -> InputModel:
        """Plan the merge whose result is an input here."""
        plan = self._merge(recipe)
        computed_by = self._workspace.compute(plan)
        title = f"{recipe.origin}: merge {recipe.name!r}"
        generated = {name: data for name, data in documents(plan).items() if name not in _OF_THE_MERGE_ALONE}
        return InputModel(
            title=title,
            tensors=MappingProxyType(
                {name: MergedTensor(title, tensor, computed_by) for name, tensor in sorted(plan.tensors.items())}
            ),
            config=plan.donor.config if plan.config is None else plan.config,
            files=MappingProxyType({**plan.companions, **generated}),
            sources=plan.sources,
            identity=plan.plan_id,
            structure=plan.asked,
            merged=plan,
        )


def _of_architecture(model: InputModel, architecture: str) -> InputModel:
    """Return a model whose config.json names another architecture; its tensors are merged by their names anyway."""
    config = {**model.config, "architectures": [architecture]}
    files = {**model.files, "config.json": encode_config(config)}
    return replace(model, config=MappingProxyType(config), files=MappingProxyType(files))
