"""Inner products that are asked for pair by pair, added up together: each input is then loaded once for all its pairs.

Each pair is asked for, and kept, by itself, since other merges share some of the models only. Gathered one after the
other, each of K inputs would be read, and the base subtracted from it, K - 1 times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import Answer, Block, ElementSums, Moments, SingleSums
from mergefs.statistics.gatherers import Streamed

_Products: TypeAlias = ElementSums | SingleSums


def joined(wanted: Iterable[Streamed]) -> list[tuple[Streamed, tuple[Streamed, ...]]]:
    """Return what to gather instead of ``wanted``, each with those of them that it answers (``answers_of``).

    Products are joined that are of inputs, less the same base or none, and of nothing else.
    """
    found: list[tuple[Streamed, tuple[Streamed, ...]]] = []
    groups: dict[object, list[tuple[_Products, Moments]]] = {}
    for one in wanted:
        moments = one.moments
        if isinstance(one, _Products) and one.lanes is None and moments and moments.pairs and not moments.lengths:
            kind = type(one), moments.exact, one.models[-1] if moments.based else None
            groups.setdefault(kind, []).append((one, moments))
        else:
            found.append((one, (one,)))
    return found + [(_join(group), tuple(one for one, _ in group)) for group in groups.values()]


def answers_of(answer: Answer, parts: Sequence[Streamed]) -> list[Answer]:
    """Return the answer of each of ``parts`` from that of what was gathered instead."""
    if not isinstance(answer, np.ndarray):
        return [answer]
    ends = np.cumsum([part.count for part in parts if isinstance(part, _Products)])
    return list(np.split(answer, ends[:-1]))


def _join(group: Sequence[tuple[_Products, Moments]]) -> _Products:
    """Return the products of all pairs of a group, of the inputs that any of them is about."""
    first, moments = group[0]
    if len(group) == 1:
        return first
    base = first.models[-1:] if moments.based else ()
    inputs = tuple(dict.fromkeys(model for one, _ in group for model in one.models[: len(one.models) - len(base)]))
    pairs = tuple(
        (inputs.index(one.models[left]), inputs.index(one.models[right]))
        for one, of in group
        for left, right in of.pairs
    )

    def terms(block: Block, precision: Precision) -> Array:
        """Return the terms of all, those of one pair after the other."""
        values = dict(zip(inputs + base, block.inputs, strict=True))
        parts = [Block(tuple(values[model] for model in one.models), block.start) for one, _ in group]
        return np.concatenate([one.terms(part, precision) for (one, _), part in zip(group, parts, strict=True)])

    return replace(
        first,
        models=inputs + base,
        terms=terms,
        fused=None,
        moments=replace(moments, pairs=pairs),
        count=len(pairs),
    )
