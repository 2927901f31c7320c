"""Writes what the study found into docs/budget.md, between two marks; the rest of the page is written by hand."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from budget_study.results import FamilyFigures, Figures, MethodFigures
from budget_study.study import PLANES, STRATEGIES
from mergefs.errors import MergefsError
from mergefs.units import format_size

BEGIN: Final = "<!-- measured by scripts/measure_budget.py: begin -->"
END: Final = "<!-- measured by scripts/measure_budget.py: end -->"

CLAIMS: Final = {"6.25%": 0.56, "12.5%": 0.33, "25%": 0.10}
"""The relative error that task arithmetic with planes must not exceed, by budget."""

_TIE: Final = 1e-3
"""By so much of the whole delta errors may differ and count as equal: dare's masks and rounding move them so far."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, and whether the figures bear it out."""

    claim: str
    holds: bool


def verdicts(families: Sequence[FamilyFigures], budgets: Sequence[str]) -> list[Verdict]:
    """Return what is claimed of planes: limits for task arithmetic, and that nothing else is better, for any method."""
    found = []
    for family in families:
        for method in family.methods:
            where = f"{method.merge.method} on {family.family.kind.name}"
            for number, budget in enumerate(budgets):
                errors = {name: entries[number].error for name, entries in method.strategies.items()}
                others = min(error for name, error in errors.items() if name != "planes")
                claim = f"{where} at {budget}: planes leave {errors['planes']:.4f}, the best other rule {others:.4f}"
                found.append(Verdict(claim, errors["planes"] <= others + _TIE))
                if method.merge.method == "task_arithmetic" and budget in CLAIMS:
                    claim = f"{where} at {budget}: planes leave {errors['planes']:.4f}, at most {CLAIMS[budget]}"
                    found.append(Verdict(claim, errors["planes"] <= CLAIMS[budget]))
    return found


def measured_section(families: Sequence[FamilyFigures], budgets: Sequence[str], figure: str) -> str:
    """Return the tables, as Markdown."""
    parts = [f"![Relative error by budget, for each method and family]({figure})\n"]
    for family in families:
        parts.append(_family_heading(family))
        parts += [_method_table(method, budgets) for method in family.methods]
    failed = [verdict.claim for verdict in verdicts(families, budgets) if not verdict.holds]
    if failed:
        parts.append("Not as claimed:\n\n" + "\n".join(f"* {claim}" for claim in failed) + "\n")
    return "\n".join(parts)


def with_section(page: str, section: str) -> str:
    """Return ``page`` with ``section`` between the marks; MergefsError where it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MergefsError(f"the page has no lines {BEGIN!r} and {END!r}; put them where the tables are to stand")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def _family_heading(family: FamilyFigures) -> str:
    """Return what a family is, and what analysing it took."""
    experts, analysis = len(family.family.models.experts), family.analysis
    return (
        f"### {family.family.kind.title}\n\n"
        f"{family.parameters / 1e6:.1f} M parameters in BF16, a base and {experts} experts "
        f"({', '.join(domain.title for domain in family.family.domains)}). Held-out perplexity: base "
        f"{family.base_perplexity:.3f}, each expert on its own text {family.experts_perplexity:.3f}. "
        f"`mergefs analyze` took {analysis.seconds:.1f} s on {platform.machine()}, with `--planes {PLANES}` "
        f"{analysis.seconds_with_planes:.1f} s; the planes take {format_size(analysis.planes_bytes)}, "
        f"{100 * analysis.planes_bytes / analysis.expert_bytes:.1f} % of the experts.\n"
    )


def _method_table(method: MethodFigures, budgets: Sequence[str]) -> str:
    """Return the table of one method: relative error and perplexity for each strategy and budget."""
    merge = method.merge
    settings = ", ".join(f"{key} {value}" for key, value in merge.per_expert.items())
    lines = [
        f"**`{merge.method}`** ({settings}); the whole merge has perplexity {method.whole_perplexity:.3f}\n",
        "| read of the experts | " + " | ".join(budget.replace("%", " %") for budget in budgets) + " |",
        "|---" + "|---:" * len(budgets) + "|",
    ]
    best = [min(entries[n].error for entries in method.strategies.values()) for n in range(len(budgets))]
    for strategy in STRATEGIES:
        entries = method.strategies[strategy.name]
        cells = [_cell(entry, entry.error <= least) for entry, least in zip(entries, best, strict=True)]
        lines.append(f"| {strategy.title} | " + " | ".join(cells) + " |")
    if None not in method.single_rows:
        singles = " | ".join(_error(error) for error in method.single_rows if error is not None)
        lines.append(f"| single rows by norm (not offered) | {singles} |")
    lines.append("| Shannon bound | " + " | ".join(_error(bound) for bound in method.bounds) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Figures, best: bool) -> str:
    error = f"**{_error(entry.error)}**" if best else _error(entry.error)
    return f"{error} / {entry.perplexity:.3f}"


def _error(value: float) -> str:
    """Return an error with three decimals, or with one digit that is not zero."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"
