"""Inner products that are asked for pair by pair, added up together: each input is then loaded once for all its pairs.

Each pair is asked for, and kept, by itself, since other merges share some of the models only. Gathered one after the
other, each of K inputs would be read, and the base subtracted from it, K - 1 times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import Answer, Block, ElementSums, SingleSums
from mergefs.statistics.gatherers import Streamed

_Products: TypeAlias = ElementSums | SingleSums


def joined(wanted: Iterable[Streamed]) -> list[tuple[Streamed, tuple[Streamed, ...]]]:
    """Return what to gather instead of ``wanted``, each with those of them that it answers (``answers_of``)."""
    groups: dict[object, list[_Products]] = {}
    found: list[tuple[Streamed, tuple[Streamed, ...]]] = []
    for one in wanted:
        if isinstance(one, _Products) and _is_joinable(one):
            groups.setdefault(_kind(one), []).append(one)
        else:
            found.append((one, (one,)))
    return found + [(_join(group) if len(group) > 1 else group[0], tuple(group)) for group in groups.values()]


def answers_of(answer: Answer, parts: Sequence[Streamed]) -> list[Answer]:
    """Return the answer of each of ``parts`` from that of what they were joined to."""
    if len(parts) == 1 or not isinstance(answer, np.ndarray):
        return [answer]
    ends = np.cumsum([part.count for part in parts if isinstance(part, _Products)])
    return list(np.split(answer, ends[:-1]))


def _is_joinable(one: _Products) -> bool:
    """Return whether these are products of inputs, less a base or not, and of nothing else."""
    return one.lanes is None and one.moments is not None and bool(one.moments.pairs) and not one.moments.lengths


def _kind(one: _Products) -> object:
    """Return what products must have in common to be added up together."""
    return type(one), one.moments and (one.moments.exact, one.models[-1] if one.moments.based else None)


def _join(group: Sequence[_Products]) -> _Products:
    """Return the products of all pairs of a group, of the inputs that any of them is about."""
    moments = group[0].moments
    if moments is None:
        raise ValueError("products without moments are not added up together")
    base = group[0].models[-1:] if moments.based else ()
    inputs = tuple(dict.fromkeys(model for one in group for model in one.models[: len(one.models) - len(base)]))
    pairs = tuple(
        (inputs.index(one.models[first]), inputs.index(one.models[second]))
        for one in group
        for first, second in (one.moments.pairs if one.moments else ())
    )

    def terms(block: Block, precision: Precision) -> Array:
        """Return the terms of all, those of one pair after the other."""
        values = dict(zip(inputs + base, block.inputs, strict=True))
        return np.concatenate(
            [one.terms(Block(tuple(values[model] for model in one.models), block.start), precision) for one in group]
        )

    return replace(
        group[0],
        models=inputs + base,
        terms=terms,
        fused=None,
        moments=replace(moments, pairs=pairs),
        count=len(pairs),
    )
