"""Numbers of reports as people read them, the same in the terminal and on the page."""

from mergefs.planner.plan import BudgetOutcome, MergePlan
from mergefs.reports.spending import Amount
from mergefs.units import format_size

EQUAL = "="
"""In the place of a share: nothing has to be read, since the base or another expert has the same bytes."""


def percent(share: float | None) -> str:
    """Return a share as a number of two or three digits: 100 and 0 are exact, what is between is told as such."""
    if share is None:
        return "?"
    if 0 < share <= 0.005:
        return "<1"
    if 0.995 <= share < 1:
        return "99"
    return f"{100 * share:.0f}"


def bought(amount: Amount) -> str:
    """Return the share of bytes that is bought, in percent."""
    if amount.total and amount.free == amount.total:
        return EQUAL
    return percent(amount.bought)


def error(amount: Amount) -> str:
    """Return the error that is left, in percent of the delta."""
    return EQUAL if amount.energy == 0 else percent(amount.error)


def details(amount: Amount) -> str:
    """Return all that is known of a cell, in one line."""
    parts = [f"{format_size(amount.planned)} of {format_size(amount.total)} bought"]
    if amount.free:
        parts.append(f"{format_size(amount.free)} free")
    if amount.read is not None:
        parts.append(f"{format_size(amount.read)} really read")
    if amount.energy == 0:
        parts.append("no delta")
    elif amount.error is not None:
        parts.append(f"error left {amount.error:.4f} of the delta")
    else:
        parts.append("error not known")
    return ", ".join(parts)


def facts(plan: MergePlan) -> dict[str, str]:
    """Return what there is to say of a plan as a whole, by title."""
    outcome = plan.outcome
    share = outcome.expert_bytes_planned / outcome.expert_bytes_total if outcome.expert_bytes_total else 0.0
    return {
        "plan": plan.plan_id,
        "recipe": plan.recipe.origin,
        "method": plan.recipe.method,
        "budget": "none" if outcome.budget_bytes is None else format_size(outcome.budget_bytes),
        "experts": f"{format_size(outcome.expert_bytes_planned)} of {format_size(outcome.expert_bytes_total)} "
        f"({share:.1%})",
        "base": format_size(outcome.base_bytes),
        "output": format_size(outcome.output_bytes),
        "predicted error": predicted_error(outcome),
        "error at most": largest_error(outcome),
    }


def predicted_error(outcome: BudgetOutcome) -> str:
    """Return the error that is expected, and what kind of number it is."""
    number = f"{outcome.predicted_relative_error:.4f} of the merged delta"
    if outcome.predicted_by == "exact":
        return f"{number} (exact)" if outcome.predicted_relative_error else "none"
    if outcome.predicted_standard_error is None:
        return f"{number} (an estimate, from norms and angles of the deltas)"
    return f"{number} +- {outcome.predicted_standard_error:.4f} (an estimate, from a sample of merged blocks)"


def largest_error(outcome: BudgetOutcome) -> str:
    """Return the bound of the error that is certain."""
    if outcome.error_bound is None:
        return "not known for certain"
    if outcome.error_bound == 0:
        return "none"
    relative = outcome.error_bound_relative
    beside = "" if relative is None else f", {relative:.4f} of the merged delta"
    return f"{outcome.error_bound:.4g} in the Euclidean norm{beside} (certain)"
