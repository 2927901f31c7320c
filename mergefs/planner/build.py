"""Makes plans: opens the models, plans the tensors, and spends the budget."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.errors import BudgetError
from mergefs.methods.registry import get_method, method_origin
from mergefs.planner.analysis import analyze_family, record_checkpoints
from mergefs.planner.assembly import assemble
from mergefs.planner.budget import parse_budget
from mergefs.planner.configuration import merged_config
from mergefs.planner.everything import select_everything
from mergefs.planner.identity import asked_identity
from mergefs.planner.keeping import keep_plan
from mergefs.planner.layout import lay_out, lay_out_for_sharing
from mergefs.planner.levels import Selection
from mergefs.planner.models import ModelOpener
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import BudgetOutcome, FileContent, InputModel, MergePlan, PlanInput, TensorPlan
from mergefs.planner.prediction.predicted import NOTHING_LEFT_OUT, Prediction
from mergefs.planner.tensors import TensorPlanner
from mergefs.planner.tokenizer import plan_tokenizer
from mergefs.planner.vocabulary import Alignment
from mergefs.planner.workspace import Workspace
from mergefs.progress import Progress, Silence
from mergefs.recipe.definition import Recipe
from mergefs.recipe.parameters import filter_notes, gradient_notes
from mergefs.recipe.references import ModelReference
from mergefs.sources.place import Role
from mergefs.statistics.contents import identify
from mergefs.statistics.identity import checkpoint_identity, is_local, plan_id
from mergefs.tokenizer.files import is_tokenizer_file

__all__ = ["Draft", "Drafter", "PlanOptions", "Planning", "analyze_draft", "draft_plan", "make_plan"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan before the budget is spent: every tensor is there and everything is read.

    ``config`` is the content of the merged model's config.json, None where the donor's file stays as it is.
    ``companions`` are the files beside the weights that come from models, ``tokenizer`` identifies what the recipe
    changes in them.
    """

    recipe: Recipe
    inputs: tuple[PlanInput, ...]
    stand_in: PlanInput | None
    donor: InputModel
    config: Mapping[str, Any] | None
    companions: Mapping[str, FileContent]
    tokenizer: str | None
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]

    @property
    def all_inputs(self) -> tuple[PlanInput, ...]:
        """The inputs of the recipe, and the stand-in for what is not bought where it is not one of them."""
        return self.inputs if self.stand_in is None else (*self.inputs, self.stand_in)

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """Every directory that takes part, each once."""
        return tuple({id(source): source for entry in self.all_inputs for source in entry.model.sources}.values())


def make_plan(
    recipe: Recipe,
    options: PlanOptions,
    workspace: Workspace,
    progress: Progress | None = None,
    identified: bool = False,
    gather: bool = True,
) -> MergePlan:
    """Return the plan of ``recipe`` and keep it in the catalog.

    Without a budget only headers are read, unless the plan is to be ``identified``: then every input whose contents are
    not known is hashed first, and the plan is the same on every machine. A budget below all expert bytes needs block
    statistics: what is missing is gathered first, together with what the method asks for, which reads the models once
    (and what does not fit in memory again), and what the budget leaves out of a merge that is not linear is measured on
    some of its blocks. The ledger counts all of that as analysis. Without ``gather`` nothing is read for block
    statistics, and missing ones are a BudgetError.
    """
    planning = Planning(recipe, options, workspace, progress or Silence(), gather)
    if identified and planning.limit(options.budget) is None:
        planning.identify()
    plan = planning.within(options.budget)
    keep_plan(plan, workspace.catalog)
    return plan


class Planning:
    """Makes plans of one recipe: models are opened once, and analysed once where any of the plans needs that.

    Nothing is kept in the catalog but what analyses find. Without ``gather`` nothing is analysed, and what is missing
    is an error.
    """

    def __init__(
        self, recipe: Recipe, options: PlanOptions, workspace: Workspace, progress: Progress, gather: bool = True
    ) -> None:
        self._recipe = recipe
        self._options = options
        self._workspace = workspace
        self._progress = progress
        self._drafter = Drafter(options, workspace, progress)
        self._gather = gather
        self._analysed = False
        self.draft = self._drafter.draft(recipe)

    @property
    def total(self) -> int:
        """The bytes of experts that the whole merge reads."""
        return sum(tensor.expert_bytes for tensor in self.draft.tensors)

    def limit(self, budget: str | None) -> int | None:
        """Return the bytes that a budget allows; None where that is everything, since then it is no budget."""
        total = self.total
        limit = total if budget is None else parse_budget(budget).limit(total)
        return limit if limit < total else None

    def analyze(self) -> None:
        """Gather what the catalog lacks; the draft then has identities by content."""
        if not self._analysed:
            if self._gather:
                analyze_draft(self.draft, self._workspace, self._progress)
            self.draft = self._drafter.draft(self._recipe)
            self._analysed = True

    def identify(self) -> None:
        """Hash every input whose contents are not known; the draft then has identities by content."""
        workspace = self._workspace
        if any(is_local(checkpoint_identity(source, workspace.catalog)) for source in self.draft.sources):
            record_checkpoints(self.draft.sources, workspace.catalog)  # before anything about them
            identify(self.draft.sources, workspace.catalog, workspace.reader, self._progress)
            self.draft = self._drafter.draft(self._recipe)

    def within(self, budget: str | None) -> MergePlan:
        """Return the plan within ``budget``. Raises BudgetError where there is none."""
        options, limit = replace(self._options, budget=budget), self.limit(budget)
        tensors, prediction = self.draft.tensors, NOTHING_LEFT_OUT
        if limit is not None:
            from mergefs.planner.spending import spend  # here, since most plans have no budget

            _require_stand_in(self.draft, options)
            self.analyze()
            tensors, prediction = spend(self.draft.tensors, limit, self._workspace)
        else:
            # A budget that pays for everything is no budget: the same plan, and the same files.
            tensors = select_everything(tensors, self._workspace.catalog)
        return self.plan_of(tensors, options, limit, prediction)

    def plan_of(
        self,
        tensors: tuple[TensorPlan, ...],
        options: PlanOptions,
        budget_bytes: int | None,
        prediction: Prediction = NOTHING_LEFT_OUT,
    ) -> MergePlan:
        """Return the plan in which ``tensors``, those of the draft with what is selected of them, are computed."""
        draft = replace(self.draft, tensors=tensors)
        plan = _assemble(draft, options, budget_bytes, prediction, self._workspace.catalog)
        if options.base is None or not self._recipe.bases:
            return plan
        note = f"{self._recipe.origin} names its own base, so --base is not used for it"
        return replace(plan, notes=(*plan.notes, note))


class Drafter:
    """Plans recipes without spending a budget; a model directory is opened once, whatever names it."""

    def __init__(self, options: PlanOptions, workspace: Workspace, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._catalog = workspace.catalog
        self._statistics = workspace.statistics
        self._base = None if options.base is None else ModelReference(options.base, options.base, None, None)
        self._opener = ModelOpener(workspace, self._base, self._merge)

    def draft(self, recipe: Recipe) -> Draft:
        """Open the models of ``recipe`` and plan every tensor; reads headers only."""
        opened: dict[ModelReference, PlanInput] = {}
        for entry in recipe.inputs():
            role = Role.BASE if entry.model in recipe.bases else Role.EXPERT
            opened[entry.model] = self._opener.open(entry.model, recipe, role)
        stand_in, named = None, recipe.base or self._base
        if recipe.base is not None and recipe.base not in opened:
            stand_in = self._opener.open(recipe.base, recipe, Role.BASE)
        elif not recipe.bases and self._base is not None:
            stand_in = self._opener.open(self._base, recipe, Role.BASE)
        models = {reference: entry.model for reference, entry in opened.items()}
        donor = _donor(recipe, opened, stand_in)
        assembly = assemble(recipe, models, donor)
        instead = (named, stand_in.model) if named is not None and stand_in is not None else None
        tokenizer = plan_tokenizer(recipe, models, instead, donor, self._catalog, self._progress)
        alignment = Alignment(tokenizer.vocabulary, self._options.truncate_embeddings, self._statistics, named)
        planned = TensorPlanner(recipe, models, stand_in, donor, self._options.random_seed, alignment).plan(assembly)
        return Draft(
            recipe=recipe,
            inputs=tuple(opened.values()),
            stand_in=stand_in,
            donor=donor,
            config=merged_config(donor, recipe, assembly.layers, alignment.vocabulary_size),
            companions=tokenizer.companions,
            tokenizer=tokenizer.digest,
            tensors=planned.tensors,
            notes=(
                *self._opener.notes,
                *tokenizer.notes,
                *planned.notes,
                *filter_notes(recipe, planned.names),
                *gradient_notes(recipe, donor.number_of_layers),
            ),
        )

    def _merge(self, recipe: Recipe) -> MergePlan:
        """Plan a merge whose result another recipe merges: whole, since the budget is spent by the other."""
        draft = self.draft(recipe)
        # Its tokenizer may be needed by the other, whatever the merged model is to have.
        options = replace(self._options, budget=None, copy_tokenizer=True)
        return _assemble(draft, options, None, NOTHING_LEFT_OUT, self._catalog, inner=True)


def _donor(recipe: Recipe, opened: Mapping[ModelReference, PlanInput], stand_in: PlanInput | None) -> InputModel:
    """Return the model that gives config.json and the other files: the base, or without one the first model."""
    if recipe.base is None:
        return next(iter(opened.values())).model
    if recipe.base in opened:
        return opened[recipe.base].model
    if stand_in is None:
        raise ValueError("a base that is no input is opened as a stand-in")
    return stand_in.model


def draft_plan(recipe: Recipe, options: PlanOptions, workspace: Workspace) -> Draft:
    """Open the models of ``recipe`` and plan every tensor; reads headers only."""
    return Drafter(options, workspace, Silence()).draft(recipe)


def analyze_draft(draft: Draft, workspace: Workspace, progress: Progress) -> dict[Path, int]:
    """Gather every statistic that planning and reading could need; the models then have identities by content.

    Returns what ``analyze_family`` does.
    """
    try:
        return analyze_family(draft.tensors, draft.sources, workspace, progress)
    finally:
        workspace.catalog.flush()


def _require_stand_in(draft: Draft, options: PlanOptions) -> None:
    """Refuse a budget where nothing can stand in for what is not read."""
    without = [tensor for tensor in draft.tensors if tensor.context is not None and tensor.stand_in is None]
    lacking = next((tensor for tensor in without if tensor.expert_bytes), None)
    if lacking is None:
        return
    if draft.stand_in is None:
        raise BudgetError(
            f"{draft.recipe.origin}: budget {options.budget!r} leaves blocks unread, and a {draft.recipe.method} "
            "merge without a base has nothing to stand in for them; name a model with --base, or read all: 100%"
        )
    raise BudgetError(
        f"{draft.recipe.origin}: budget {options.budget!r} leaves blocks unread, and {draft.stand_in.model.title} "
        "has no "
        f"tensor {lacking.name!r} of shape {list(lacking.shape)} to stand in for them; name another model with "
        "--base, or "
        "read all: 100%"
    )


def _assemble(
    draft: Draft,
    options: PlanOptions,
    budget_bytes: int | None,
    prediction: Prediction,
    catalog: Catalog,
    inner: bool = False,
) -> MergePlan:
    """Lay out the files, which nobody sees of an ``inner`` merge, and name the plan."""
    asked = asked_identity(
        draft.recipe,
        draft.inputs,
        draft.stand_in,
        draft.tensors,
        budget_bytes,
        options,
        method_origin(draft.recipe.method),
        draft.tokenizer,
    )
    its_id = plan_id(asked, [entry.identity for entry in draft.all_inputs])
    known = catalog.plan(its_id)
    return MergePlan(
        plan_id=its_id,
        recipe=draft.recipe,
        method=get_method(draft.recipe.method),
        inputs=draft.inputs,
        stand_in=draft.stand_in,
        donor=draft.donor,
        config=draft.config,
        companions=_companions(draft, options),
        tokenizer=draft.tokenizer,
        tensors={tensor.name: tensor for tensor in draft.tensors},
        files=(lay_out if inner else lay_out_for_sharing)(draft.tensors, options.max_shard_size),
        outcome=_outcome(draft.tensors, budget_bytes, prediction),
        options=options,
        notes=draft.notes,
        created_ns=known.created_ns if known else time.time_ns(),
    )


def _companions(draft: Draft, options: PlanOptions) -> Mapping[str, FileContent]:
    """Return the files beside the weights, without the donor's tokenizer where it is not wanted."""
    if options.copy_tokenizer or draft.recipe.tokenizer is not None:
        return draft.companions
    return {name: content for name, content in draft.companions.items() if not is_tokenizer_file(name)}


def _outcome(tensors: Sequence[TensorPlan], budget_bytes: int | None, prediction: Prediction) -> BudgetOutcome:
    """Add up what the plan costs."""
    blocks = selected = 0
    for tensor in tensors:
        for index, role in enumerate(tensor.roles):
            if role is Role.EXPERT:
                count = tensor.grid.count
                blocks += count
                selected += count if tensor.selection is None else _blocks_bought(tensor.selection, index)
    return BudgetOutcome(
        budget_bytes=budget_bytes,
        expert_bytes_total=sum(tensor.expert_bytes for tensor in tensors),
        expert_bytes_planned=sum(tensor.planned_expert_bytes for tensor in tensors),
        base_bytes=sum(tensor.base_bytes for tensor in tensors),
        output_bytes=sum(tensor.nbytes for tensor in tensors),
        blocks_total=blocks,
        blocks_selected=selected,
        predicted_relative_error=prediction.relative_error,
        predicted_by=prediction.how,
        predicted_standard_error=prediction.standard_error,
        error_bound=prediction.bound,
        error_bound_relative=prediction.relative_bound,
        merged_delta_norm=prediction.merged_norm,
    )


def _blocks_bought(selection: Selection, index: int) -> int:
    """Return of how many blocks of one input something is bought, or nothing is missing."""
    return int((selection.bought[index] | selection.read[index]).sum())
