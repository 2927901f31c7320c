"""Measures what a selection leaves out by merging blocks both ways: as it buys them, and from everything.

Small models are merged altogether. Of larger ones blocks are drawn, each with a probability in proportion to what is
expected of it (half by its error, half by its part of the merged delta), at equal distances along all tensors in their
order (systematic sampling, Madow 1949): so the sample has its share of every stretch of the model, and is the same
whenever it is drawn. Sums are estimated by dividing what is found by the probability (Hansen and Hurwitz 1943), and the
variance from differences of neighbours in the sample (Wolter 1984).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.records import VectorRecord
from mergefs.kernels.precision import Raw, load
from mergefs.planner.identity import bought_digest
from mergefs.planner.levels import NOTHING, Selection
from mergefs.planner.merged import merge_formula
from mergefs.planner.plan import TensorPlan
from mergefs.planner.prediction.expected import Expected
from mergefs.planner.workspace import Workspace
from mergefs.statistics.identity import digest, sources_of, tensor_keys

EVERYTHING_BYTES: Final = 64 * 2**20
"""Of a model with no more bytes of experts every block is merged; of others about so many are read."""
_FEWEST_DRAWS: Final = 24
_FORMAT: Final = 1
"""Changes when other numbers would come out, so that what is kept in the catalog is not found any more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor with the selection to be measured, what is expected of its blocks, and which of these it affects."""

    tensor: TensorPlan
    expected: Expected
    affected: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Measured:
    """Squared norms over all candidates, of the ``error`` and of the ``merged`` delta.

    ``variance`` is that of the estimated ``error / merged``, None where everything was merged.
    """

    error: float
    merged: float
    variance: float | None


class Sampler:
    """Measures selections of the same tensors; the full merge of a block is computed once."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._full: dict[tuple[str, int], tuple[Raw, float]] = {}

    def known(self, candidates: Sequence[Candidate]) -> Measured | None:
        """Return what the catalog knows that the selections of ``candidates`` leave out, or None."""
        record = self._workspace.catalog.vector(self._key(candidates))
        if record is None:
            return None
        error, merged, variance = map(float, np.frombuffer(record.values, dtype="<f8"))
        return Measured(error, merged, None if math.isnan(variance) else variance)

    def measure(self, candidates: Sequence[Candidate]) -> Measured:
        """Return what the selections of ``candidates`` leave out, and keep it in the catalog."""
        total = sum(candidate.tensor.expert_bytes for candidate in candidates)
        found = self._everything(candidates) if total <= EVERYTHING_BYTES else self._drawn(candidates, total)
        numbers = (found.error, found.merged, math.nan if found.variance is None else found.variance)
        record = VectorRecord(np.array(numbers, dtype="<f8").tobytes())
        # The tensors of a model come and go together, so the largest says whether there still is anything to know.
        places = max(candidates, key=lambda candidate: candidate.tensor.nbytes).tensor.places if candidates else ()
        catalog = self._workspace.catalog
        catalog.keep_vector(self._key(candidates), record, sources_of(catalog, *places))
        self._workspace.catalog.flush()
        return found

    def _key(self, candidates: Sequence[Candidate]) -> bytes:
        """Return the key that all that is measured follows from: methods, contents, and what is bought."""
        parts: list[bytes] = []
        for tensor in (candidate.tensor for candidate in candidates):
            places = tensor.places if tensor.stand_in is None else (*tensor.places, tensor.stand_in)
            parts += [merge_formula(tensor), bought_digest(tensor)]
            parts += [tensor_keys(place, self._workspace.catalog)[0] for place in places]
        return digest("prediction", _FORMAT, *parts)

    def _everything(self, candidates: Sequence[Candidate]) -> Measured:
        """Merge all blocks."""
        error = merged = 0.0
        for candidate in candidates:
            blocks = list(range(candidate.tensor.grid.count))
            found = self._squares(candidate, blocks)
            error, merged = error + float(found[:, 0].sum()), merged + float(found[:, 1].sum())
        return Measured(error, merged, None)

    def _drawn(self, candidates: Sequence[Candidate], total: int) -> Measured:
        """Merge a sample of the blocks."""
        error = np.concatenate([candidate.expected.error for candidate in candidates])
        merged = np.concatenate([candidate.expected.merged for candidate in candidates])
        chances = _shares(error) + _shares(merged)
        chances = chances / chances.sum()
        count = max(_FEWEST_DRAWS, EVERYTHING_BYTES * chances.size // total)
        positions = (np.arange(count) + 0.5) / count
        drawn = np.minimum(np.searchsorted(np.cumsum(chances), positions), chances.size - 1)
        firsts = np.cumsum([0, *(candidate.tensor.grid.count for candidate in candidates)])
        squares = np.zeros((count, 2))
        for number, candidate in enumerate(candidates):
            mine = np.flatnonzero((drawn >= firsts[number]) & (drawn < firsts[number + 1]))
            blocks, back = np.unique(drawn[mine] - firsts[number], return_inverse=True)
            if blocks.size:
                squares[mine] = self._squares(candidate, blocks.tolist())[back]
        return _estimated(squares / chances[drawn][:, np.newaxis])

    def _squares(self, candidate: Candidate, blocks: list[int]) -> NDArray[np.float64]:
        """Return the squared norms (float64 [blocks, 2]) of the error and of the merged delta of some blocks."""
        tensor = candidate.tensor
        self._merge_fully(tensor, blocks)
        found = np.zeros((len(blocks), 2))
        found[:, 1] = [self._full[tensor.name, block][1] for block in blocks]
        places = [place for place, block in enumerate(blocks) if candidate.affected[block]]
        partly = self._workspace.merge_blocks(tensor, [blocks[place] for place in places])
        for place, raw in zip(places, partly, strict=True):
            found[place, 0] = _square(tensor, raw, self._full[tensor.name, blocks[place]][0])
        return found

    def _merge_fully(self, tensor: TensorPlan, blocks: Sequence[int]) -> None:
        """Compute the full merge of blocks that have not been merged yet, and its distance from the base."""
        missing = [block for block in blocks if (tensor.name, block) not in self._full]
        whole, untouched = replace(tensor, selection=None), replace(tensor, selection=_nothing(tensor))
        both = (self._workspace.merge_blocks(one, missing) for one in (whole, untouched))
        for block, full, base in zip(missing, *both, strict=True):
            self._full[tensor.name, block] = full, _square(tensor, full, base)


def _nothing(tensor: TensorPlan) -> Selection:
    """Return the selection that leaves a tensor to the base."""
    levels = np.full((len(tensor.places), tensor.grid.count), NOTHING, dtype=np.uint8)
    return replace(
        Selection.everything(tensor.grid, len(tensor.places)),
        levels=levels,
        computed=np.zeros(tensor.grid.count, dtype=np.bool_),
    )


def _shares(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return which share of all each block has; equal shares where there is nothing."""
    total = float(squares.sum())
    return squares / total if total > 0 else np.full(squares.size, 1 / squares.size)


def _square(tensor: TensorPlan, first: Raw, second: Raw) -> float:
    """Return the squared norm of the difference of two blocks of a merged tensor.

    What is not finite counts as nothing, since no prediction of it means anything.
    """
    values, others = (load(raw, tensor.dtype, tensor.dtype).astype(np.float64) for raw in (first, second))
    with np.errstate(all="ignore"):
        difference = values - others
    finite = difference[np.isfinite(difference)]
    return float((finite * finite).sum())


def _estimated(scaled: NDArray[np.float64]) -> Measured:
    """Return the estimate from what was found, divided by its probability (float64 [draws, 2])."""
    error, merged = (float(mean) for mean in scaled.mean(axis=0))
    ratio = error / merged if merged > 0 else 0.0
    off = np.diff(scaled[:, 0] - ratio * scaled[:, 1])
    variance = float((off * off).sum()) / (2 * off.size * scaled.shape[0])
    return Measured(error, merged, variance / merged**2 if merged > 0 else 0.0)
