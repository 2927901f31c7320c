"""Everything that ``mergefs explain`` tells of a plan, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from mergefs.engine.readings import Reading, last_reading
from mergefs.planner.plan import MergePlan
from mergefs.planner.workspace import Workspace
from mergefs.reports.heatmap import Panel, panels, position, short_ends
from mergefs.reports.spending import Amount, Spending, experts, spendings, total
from mergefs.reports.wording import facts


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """What is spent on one expert, in all and tensor by tensor; ``label`` is short and its own among the experts."""

    reference: str
    label: str
    amount: Amount
    spendings: tuple[Spending, ...]

    def panels(self, most_rows: int | None = None) -> tuple[Panel, ...]:
        """Return the heat maps of the expert."""
        return panels(self.spendings, most_rows)

    def by_kind(self) -> Mapping[str, Amount]:
        """Return what is spent on each kind of tensor, over all layers."""
        found: dict[str, Amount] = {}
        for entry in self.spendings:
            kind = position(entry.tensor).kind
            found[kind] = found.get(kind, Amount()) + entry.amount
        return dict(zip(short_ends(tuple(found), "."), found.values(), strict=True))


@dataclass(frozen=True, slots=True)
class LastReading:
    """How and when a plan was last read, and the bytes that were read again, since a cache had dropped them."""

    how: str
    when: str
    again: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the bytes of a plan go: ``facts`` of all of it by title, each expert, and the last reading of it."""

    facts: Mapping[str, str]
    experts: tuple[ExpertReport, ...]
    reading: LastReading | None
    notes: tuple[str, ...]

    @property
    def amount(self) -> Amount:
        """What is spent in all."""
        return sum((expert.amount for expert in self.experts), Amount())


def explain(plan: MergePlan, workspace: Workspace) -> Explanation:
    """Return the explanation of ``plan`` from what the catalog knows; reads no model."""
    reading = last_reading(plan.plan_id, workspace.catalog)
    spent = spendings(plan, workspace, None if reading is None else reading.first())
    references = [entry.reference for entry in experts(plan)]
    reports = []
    for index, (reference, label) in enumerate(zip(references, short_ends(references, "/"), strict=True)):
        own = tuple(item for item in spent if item.expert == index)
        reports.append(ExpertReport(reference, label, total(own), own))
    return Explanation(facts(plan), tuple(reports), None if reading is None else _last(reading), plan.notes)


def _last(reading: Reading) -> LastReading:
    when = datetime.fromtimestamp(reading.changed_ns / 1e9, tz=timezone.utc)
    return LastReading(reading.how, when.strftime("%Y-%m-%d %H:%M UTC"), reading.again)
