"""Answers about quantities: sums, values of rows, thresholds and quantiles, by streaming over a tensor."""

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from mergefs.kernels.precision import Precision
from mergefs.methods.contract import (
    Answer,
    ColumnSums,
    ElementNorms,
    ElementQuantile,
    ElementSum,
    ElementSums,
    ElementThreshold,
    Quantity,
    RowValues,
    SingleSums,
)
from mergefs.statistics.gatherers import Gatherer, Streamed, gatherer_of
from mergefs.statistics.joining import answers_of, joined
from mergefs.statistics.moments import BlockGatherer, moments_of
from mergefs.statistics.order import largest, ranked_keys
from mergefs.statistics.stream import TensorStream

AboutQuantity: TypeAlias = (
    ElementSum | ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums | ElementThreshold | ElementQuantile
)


def answer_quantities(wanted: Sequence[AboutQuantity], stream: TensorStream) -> dict[AboutQuantity, Answer]:
    """Return the answers to ``wanted``: sums and rows from one pass, order statistics from some for each quantity."""
    streamed = [one for one in wanted if isinstance(one, Streamed)]
    by_block: list[tuple[tuple[Streamed, ...], BlockGatherer]] = []
    by_tile: dict[AboutQuantity, Gatherer] = {}
    for statistic, parts in joined(streamed):
        moments = moments_of(statistic, stream)
        if moments is None:
            by_tile |= {part: gatherer_of(part, stream.size, stream.compute) for part in parts}
        else:
            by_block.append((parts, moments))
    for block in stream.blocks(streamed) if streamed else ():
        for _, moments in by_block:
            moments.add(block)
        for tile in block.tiles(list(by_tile)) if by_tile else ():
            for gatherer, terms in zip(by_tile.values(), tile.terms, strict=True):
                gatherer.add(tile, terms)
    found: dict[AboutQuantity, Answer] = {}
    for parts, moments in by_block:
        found |= zip(parts, answers_of(moments.answer(), parts), strict=True)
    found |= {one: gatherer.answer() for one, gatherer in by_tile.items()}
    bits = Precision(stream.compute).order_bits
    for one in wanted:
        if isinstance(one, ElementThreshold):
            found[one] = largest(partial(stream.keys, one), bits, stream.size, one.keep)
    return found | _quantiles([one for one in wanted if isinstance(one, ElementQuantile)], stream)


def _quantiles(wanted: Sequence[ElementQuantile], stream: TensorStream) -> dict[AboutQuantity, Answer]:
    """Return the values at all ranks of a quantity from the same passes."""
    precision = Precision(stream.compute)
    groups: dict[Quantity, list[ElementQuantile]] = {}
    for one in wanted:
        groups.setdefault(Quantity(one.name, one.models, one.terms, one.arguments, fused=one.fused), []).append(one)
    found: dict[AboutQuantity, Answer] = {}
    for quantity, group in groups.items():
        ranks = [one.rank for one in group]
        ranked = ranked_keys(partial(stream.keys, quantity), precision.order_bits, ranks)
        found |= {one: precision.of_order_key(place.key) for one, place in zip(group, ranked, strict=True)}
    return found
