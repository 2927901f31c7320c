"""Plans of one recipe within several budgets, to see what each would bring. None of them is kept."""

from collections.abc import Iterator, Sequence

from mergefs.errors import BudgetError
from mergefs.planner.budget import parse_budget
from mergefs.planner.build import Planning
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import MergePlan
from mergefs.planner.workspace import Workspace
from mergefs.progress import Progress, Silence
from mergefs.recipe.definition import Recipe


def parse_sweep(text: str) -> tuple[str, ...]:
    """Return the budgets of a list such as ``1%,5%,8GiB``, in its order. Raises BudgetError naming a bad one."""
    budgets = tuple(part.strip() for part in text.split(","))
    if not all(budgets):
        raise BudgetError(
            f"the sweep {text!r} has an empty entry; write budgets with commas between, such as 5%,25%,50%"
        )
    for budget in budgets:
        parse_budget(budget)
    return budgets


def sweep(
    recipe: Recipe,
    options: PlanOptions,
    budgets: Sequence[str],
    workspace: Workspace,
    progress: Progress | None = None,
) -> Iterator[MergePlan]:
    """Yield the plan within each of ``budgets``: those that ``make_plan`` would make, but that none is kept.

    Models are opened, and what the catalog lacks is gathered, once and before the first plan.
    """
    planning = Planning(recipe, options, workspace, progress or Silence())
    if any(planning.limit(budget) is not None for budget in budgets):
        planning.analyze()
    for budget in budgets:
        yield planning.within(budget)
