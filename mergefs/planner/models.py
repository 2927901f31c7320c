"""Opens the models that a recipe names."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final

from mergefs.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergefs.planner.documents import documents
from mergefs.planner.merged import MergedTensor
from mergefs.planner.plan import InputModel, MergePlan, PlanInput
from mergefs.planner.workspace import Workspace
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import find_model
from mergefs.recipe.references import ModelReference
from mergefs.sources.place import Role, StoredTensor
from mergefs.statistics.identity import checkpoint_identity

_OF_THE_MERGE_ALONE: Final = ("README.md", "mergefs.json", "mergekit_config.yml", "model.safetensors.index.json")


class ModelOpener:
    """Opens models, each directory once. ``merge`` plans a recipe whose result is merged by another one."""

    def __init__(self, workspace: Workspace, merge: Callable[[Recipe], MergePlan]) -> None:
        self._workspace = workspace
        self._merge = merge
        self._checkpoints: dict[Path, Checkpoint] = {}

    def open(self, reference: ModelReference, recipe: Recipe, role: Role) -> PlanInput:
        """Return the model that ``recipe`` calls ``reference``. Raises the errors of recipes and checkpoints."""
        inner = recipe.inner.get(reference.path)
        model = self._stored(reference, recipe, role) if inner is None else self._merged(inner)
        return PlanInput(reference.text, model, role)

    def _stored(self, reference: ModelReference, recipe: Recipe, role: Role) -> InputModel:
        """Open a model directory."""
        path = find_model(reference, recipe).resolve()
        checkpoint = self._checkpoints.get(path)
        if checkpoint is None:
            checkpoint = self._checkpoints[path] = open_checkpoint(path)
        return InputModel(
            title=str(checkpoint.path),
            tensors=MappingProxyType(
                {
                    name: StoredTensor(checkpoint.shards[tensor.shard], tensor, role)
                    for name, tensor in checkpoint.tensors.items()
                }
            ),
            config=checkpoint.config,
            files=MappingProxyType({file.name: file for file in checkpoint.auxiliary}),
            sources=(checkpoint,),
            identity=checkpoint_identity(checkpoint, self._workspace.catalog),
        )

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
            merged=plan,
        )
