"""``mergefs diff``: the relative distance of every tensor of two models, of which no more than some blocks are held."""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from mergefs.comparison.distance import Squares, add, comparable, squares
from mergefs.comparison.sides import Side, SideTensor
from mergefs.engine.ahead import in_order
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader

_AHEAD: Final = 4
"""Blocks that are in memory at once, of either model."""


@dataclass(frozen=True, slots=True)
class TensorDistance:
    """How far one tensor of A is from that of B.

    ``distance`` is ||a-b||, ``norm`` ||b||, which is None where the tensors are known to be equal and were not read.
    """

    name: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    distance: float
    norm: float | None

    @property
    def relative(self) -> float:
        """||a-b|| / ||b||: 0 for equal tensors, infinite where b is all zeros and a is not, NaN where an element is."""
        return _ratio(self.distance, self.norm or 0.0)

    @property
    def read(self) -> bool:
        """Whether the tensors had to be read."""
        return self.norm is not None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that both models have, and that has no distance: other shapes, or a dtype that holds codes."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: str
    dtype_b: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All tensors of two models, the most distant first.

    ``distance`` and ``norm`` are ||A-B|| and ||B|| over the tensors that differ, whether or not the catalog knew of
    those that do not.
    """

    tensors: tuple[TensorDistance, ...]
    mismatches: tuple[Mismatch, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def differing(self) -> tuple[TensorDistance, ...]:
        """The tensors that are not equal."""
        return tuple(tensor for tensor in self.tensors if tensor.distance != 0)

    @property
    def distance(self) -> float:
        """||A-B||."""
        return math.hypot(*(tensor.distance for tensor in self.differing))

    @property
    def norm(self) -> float:
        """||B||, over the tensors that differ."""
        return math.hypot(*(tensor.norm or 0.0 for tensor in self.differing))

    @property
    def relative(self) -> float:
        """||A-B|| / ||B||, over the tensors that differ; 0 where none does."""
        return _ratio(self.distance, self.norm)

    @property
    def same(self) -> bool:
        """Whether both have the same tensors with equal elements."""
        return not (self.differing or self.mismatches or self.only_a or self.only_b)


def compare(a: Side, b: Side, reader: SourceReader, progress: Progress | None = None) -> Comparison:
    """Return how far ``a`` is from ``b``; reads both block by block, but for tensors that are known to be equal.

    Raises the errors of reading and of merging.
    """
    shared = sorted(a.tensors.keys() & b.tensors.keys())
    pairs = {name: (a.tensors[name], b.tensors[name]) for name in shared}
    mismatched = {name: pair for name, pair in pairs.items() if not _comparable(*pair)}
    listener = progress or Silence()
    distances = _distances({name: pair for name, pair in pairs.items() if name not in mismatched}, reader, listener)
    return Comparison(
        tensors=tuple(sorted(distances, key=_most_distant_first)),
        mismatches=tuple(_mismatch(name, *pair) for name, pair in mismatched.items()),
        only_a=tuple(sorted(a.tensors.keys() - b.tensors.keys())),
        only_b=tuple(sorted(b.tensors.keys() - a.tensors.keys())),
    )


def _comparable(first: SideTensor, second: SideTensor) -> bool:
    """Return whether two tensors have a distance."""
    of_numbers = comparable(first.place.dtype) and comparable(second.place.dtype)
    # A complex number is compared as two real ones, of which the other dtype would have one.
    both_complex = (first.place.dtype.kind == "complex") == (second.place.dtype.kind == "complex")
    return first.place.shape == second.place.shape and of_numbers and both_complex


def _mismatch(name: str, first: SideTensor, second: SideTensor) -> Mismatch:
    return Mismatch(name, first.place.shape, second.place.shape, first.place.dtype.name, second.place.dtype.name)


def _distances(
    pairs: Mapping[str, tuple[SideTensor, SideTensor]], reader: SourceReader, progress: Progress
) -> Iterable[TensorDistance]:
    """Return the distance of each pair, having read those that are not known to be equal."""
    unknown = {name: pair for name, pair in pairs.items() if not _known_equal(*pair)}
    progress.start("comparing", sum(side.place.nbytes for pair in unknown.values() for side in pair))
    found: list[TensorDistance] = []
    with ThreadPoolExecutor(max_workers=max(2, usable_processors()), thread_name_prefix="compare") as pool:
        for name, (first, second) in pairs.items():
            sums = None
            if name in unknown:
                sums = _squares(first, second, reader, pool, progress)
            found.append(_tensor_distance(name, first, second, sums))
    progress.finish()
    return found


def _known_equal(first: SideTensor, second: SideTensor) -> bool:
    return first.place.dtype == second.place.dtype and not first.keys.isdisjoint(second.keys)


def _squares(
    first: SideTensor, second: SideTensor, reader: SourceReader, pool: Executor, progress: Progress
) -> Squares:
    """Read two tensors block by block and return the sums of squares of their elements."""
    a, b = first.place, second.place
    for place in (a, b):
        place.prepare()

    def block(bounds: tuple[int, int]) -> tuple[Squares, int]:
        raw_a, raw_b = (place.read(reader, *bounds, Purpose.EXPERT) for place in (a, b))
        return squares(raw_a, a.dtype, raw_b, b.dtype), raw_a.nbytes + raw_b.nbytes

    parts: list[Squares] = []
    for part, size in in_order(pool, block, BlockGrid.of(b.shape), _AHEAD):
        parts.append(part)
        progress.advance(size)
    return add(parts)


def _tensor_distance(name: str, first: SideTensor, second: SideTensor, sums: Squares | None) -> TensorDistance:
    return TensorDistance(
        name=name,
        shape=second.place.shape,
        dtype_a=first.place.dtype.name,
        dtype_b=second.place.dtype.name,
        distance=0.0 if sums is None else math.sqrt(sums.difference),
        norm=None if sums is None else math.sqrt(sums.norm),
    )


def _most_distant_first(tensor: TensorDistance) -> tuple[float, str]:
    """Return a key that sorts by distance, largest first, what is not finite before all, then by name."""
    return (-math.inf if math.isnan(tensor.relative) else -tensor.relative, tensor.name)


def _ratio(distance: float, norm: float) -> float:
    if distance == 0:
        return 0.0
    return math.inf if norm == 0 else distance / norm
