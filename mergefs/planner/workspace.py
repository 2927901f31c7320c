"""What planning works with, and what it asks of whoever computes merged tensors."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from mergefs.catalog.catalog import Catalog
from mergefs.kernels.precision import Raw
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.reader import SourceReader
from mergefs.statistics.service import StatisticsService


class MergedReader(Protocol):
    """Computes tensors of one plan."""

    def read_elements(self, name: str, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return the bytes of the elements ``start`` to ``stop`` (flat indices) of a merged tensor."""

    def prepare_tensor(self, name: str) -> None:
        """Gather what computing any part of a tensor needs to know of the whole."""


class Workspace(Protocol):
    """Catalog, reader and accounts, and a way to compute the plans that another plan merges the results of."""

    @property
    def catalog(self) -> Catalog:
        """Where statistics and plans are kept."""

    @property
    def ledger(self) -> Ledger:
        """Counts what is read."""

    @property
    def reader(self) -> SourceReader:
        """Reads source files."""

    @property
    def statistics(self) -> StatisticsService:
        """Answers what methods ask of whole tensors."""

    @property
    def planning_size(self) -> int:
        """The bytes of memory that planning may take."""

    def compute(self, plan: MergePlan) -> MergedReader:
        """Return what computes the tensors of ``plan``."""

    def merge_blocks(self, tensor: TensorPlan, blocks: Sequence[int]) -> Iterator[Raw]:
        """Yield the bytes of blocks of a merged tensor, of what its selection buys; what is read counts as analysis."""
