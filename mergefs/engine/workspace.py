"""Resources that can compute the plans whose results another plan merges."""

from mergefs.engine.engine import Engine
from mergefs.engine.resources import Resources
from mergefs.planner.plan import MergePlan


class Workspace(Resources):
    """What planning works with: a ``mergefs.planner.workspace.Workspace``."""

    __slots__ = ()

    def compute(self, plan: MergePlan) -> Engine:
        """Return an engine for a plan that is merged further; what it reads, caches and counts is shared."""
        return Engine(plan, self, strict=False, nested=True)
