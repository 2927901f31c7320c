"""Resources that can compute the plans whose results another plan merges."""

from collections.abc import Iterator, Sequence

from mergefs.engine.engine import Engine
from mergefs.engine.inputs import InputReader
from mergefs.engine.merging import coefficients_of, merge_block
from mergefs.engine.resources import Resources
from mergefs.engine.tally import Tally
from mergefs.kernels.precision import Raw
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.sources.ledger import Purpose


class Workspace(Resources):
    """What planning works with: a ``mergefs.planner.workspace.Workspace``."""

    __slots__ = ()

    def compute(self, plan: MergePlan) -> Engine:
        """Return an engine for a plan that is merged further; what it reads, caches and counts is shared."""
        return Engine(plan, self, strict=False, nested=True)

    def merge_blocks(self, tensor: TensorPlan, blocks: Sequence[int]) -> Iterator[Raw]:
        """Yield blocks of a merged tensor, of what its selection buys; what is read counts as analysis."""
        tensor.prepare()
        coefficients = coefficients_of(tensor, self.statistics)
        reader = InputReader(self.reader, Tally(self.ledger))
        for block in blocks:
            yield merge_block(tensor, coefficients, reader, block, Purpose.ANALYSIS)[0]
