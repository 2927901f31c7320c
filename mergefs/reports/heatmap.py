"""Heat maps, layers x kinds of tensors: a table for each stack of layers, and one for what belongs to no layer."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mergefs.recipe.layers import split_layer
from mergefs.reports.spending import Amount, Spending

NO_LAYER: Final = "outside the layers"
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Panel:
    """One table: ``cells`` has a row for each of ``rows`` (layers) and a column for each of ``kinds``.

    A cell is None where the expert has no such tensor.
    """

    title: str
    rows: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[Amount | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a tensor stands: its stack and layer (None for a tensor of no layer), and what it is there."""

    stack: str | None
    layer: int | None
    kind: str


def position(tensor_name: str) -> Position:
    """Return the position of ``model.layers.3.mlp.experts.7.up_proj.weight``: kind ``mlp.experts.*.up_proj``."""
    parts = split_layer(tensor_name)
    kind = tensor_name if parts is None else parts.rest
    kind = _NUMBER.sub("*", kind).removesuffix(".weight")
    return Position(None, None, kind) if parts is None else Position(parts.stack, parts.index, kind)


def panels(spendings: Iterable[Spending], most_rows: int | None = None) -> tuple[Panel, ...]:
    """Return the heat maps of what is spent on one expert; at most ``most_rows`` rows each, of several layers then."""
    stacks: dict[str | None, dict[tuple[int | None, str], Amount]] = {}
    for entry in spendings:
        place = position(entry.tensor)
        cells = stacks.setdefault(place.stack, {})
        key = (place.layer, place.kind)
        cells[key] = cells.get(key, Amount()) + entry.amount
    # What belongs to no layer last: mostly the embeddings, whose few cells say little of the merge.
    ordered = sorted(stacks, key=lambda stack: (stack is None, stack or ""))
    return tuple(_panel(stack, stacks[stack], most_rows) for stack in ordered)


def short_ends(names: Sequence[str], separator: str) -> tuple[str, ...]:
    """Return the shortest ends of names (``q_proj``, ``q_proj.bias``) that tell them apart, whole parts of them."""
    labels: list[str] = []
    for name in names:
        parts = name.split(separator)
        ends = (separator.join(parts[-count:]) for count in range(1, len(parts) + 1))
        labels.append(next((end for end in ends if _ending_with(end, names, separator) == 1), name))
    return tuple(labels)


def _ending_with(end: str, names: Sequence[str], separator: str) -> int:
    return sum(name == end or name.endswith(separator + end) for name in names)


def _panel(stack: str | None, amounts: dict[tuple[int | None, str], Amount], most_rows: int | None) -> Panel:
    """Return the table of one stack."""
    kinds = tuple(dict.fromkeys(kind for _, kind in amounts))
    layers = sorted({layer for layer, _ in amounts if layer is not None})
    groups: list[list[int | None]] = [[None]]
    if stack is not None:
        size = 1 if most_rows is None else max(1, -(-len(layers) // most_rows))
        groups = [list(layers[first : first + size]) for first in range(0, len(layers), size)]
    cells = tuple(
        tuple(_sum([amounts[layer, kind] for layer in group if (layer, kind) in amounts]) for kind in kinds)
        for group in groups
    )
    return Panel(NO_LAYER if stack is None else stack, tuple(map(_row_label, groups)), kinds, cells)


def _row_label(group: Sequence[int | None]) -> str:
    if group[0] is None:
        return ""
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _sum(amounts: Sequence[Amount]) -> Amount | None:
    return sum(amounts, Amount()) if amounts else None
