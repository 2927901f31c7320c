"""The compiled loops: over the cells of a tensor, and over the steps of all tensors. Importing this imports numba."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.marks import inlined
from mergefs.kernels.fused.returning import ReturningKernel
from mergefs.planner.allocation.candidates import Terms, candidates, find_hull, gather_items, scratch, write_state

NOTHING_FITS: Final = -1
"""In the place of a chain: the steps are at their end, or at one that is worth less than asked for."""


@inlined
def _first_slope(terms: Any, cell: int, beside: float, room: Any) -> float:
    """Return by how much the error of a cell falls at most for each byte of its first step."""
    count = gather_items(terms, cell, room)
    if count == 0:
        return 0.0
    points = candidates(terms, cell, count, beside, room)
    if find_hull(points, room) == 0:
        return 0.0
    first = room.vertices[0]
    slope: float = (room.errors[0] - room.errors[first]) / room.costs[first]
    return slope


@inlined
def _carrier(terms: Any, block: int, room: Any) -> Any:
    """Return the cell of a block that its error beside the deltas' is counted with: the one that is bought first."""
    first = block * terms.cells_per_block
    behind = min(first + terms.cells_per_block, terms.energies.shape[1])
    if terms.unbought[block] <= 0.0 or behind - first == 1:
        return first
    best, steepest = first, 0.0
    for cell in range(first, behind):
        slope = _first_slope(terms, cell, terms.unbought[block], room)
        if slope > steepest:
            best, steepest = cell, slope
    return best


@inlined
def _grown(array: Any, size: int) -> Any:
    """Return a copy of a one-dimensional array with room for ``size`` entries."""
    larger = np.empty(size, array.dtype)
    for index in range(array.size):
        larger[index] = array[index]
    return larger


def _tensor_chains(
    factors: Any,
    spreads: Any,
    energies: Any,
    correlations: Any,
    givers: Any,
    is_open: Any,
    prices: Any,
    shares: Any,
    unbought: Any,
    cells_per_block: int,
) -> Any:
    """Return slopes, prices, least prices, states and gains of the steps of all cells, and where each cell's start."""
    terms = Terms(factors, spreads, energies, correlations, givers, is_open, prices, shares, unbought, cells_per_block)
    inputs, cells = energies.shape
    room = scratch(inputs, prices.shape[2])
    size = cells * inputs + 1
    slopes, gains = np.empty(size, np.float64), np.empty(size, np.float64)
    costs, least = np.empty(size, np.int64), np.empty(size, np.int64)
    states = np.empty(size * inputs, np.uint8)
    starts = np.zeros(cells + 1, np.int64)
    used, carrier = 0, 0
    for cell in range(cells):
        block = cell // cells_per_block
        if cell == block * cells_per_block:
            carrier = _carrier(terms, block, room)
        count = gather_items(terms, cell, room)
        found = 0
        if count > 0:
            beside = unbought[block] if cell == carrier else 0.0
            found = find_hull(candidates(terms, cell, count, beside, room), room)
        if used + found > size:
            size = max(2 * size, used + found)
            slopes, gains = _grown(slopes, size), _grown(gains, size)
            costs, least = _grown(costs, size), _grown(least, size)
            states = _grown(states, size * inputs)
        current = 0
        for vertex in range(found):
            point = room.vertices[vertex]
            gains[used] = room.errors[current] - room.errors[point]
            costs[used] = room.costs[point] - room.costs[current]
            least[used] = room.least[vertex]
            slopes[used] = gains[used] / costs[used]
            if vertex > 0:  # rounding must not turn the order of a cell's steps around
                slopes[used] = min(slopes[used], slopes[used - 1])
            write_state(terms, cell, count, room.codes[point], room, states[used * inputs : (used + 1) * inputs])
            used += 1
            current = point
        starts[cell + 1] = used
    bought = states[: used * inputs].copy().reshape((used, inputs))
    return slopes[:used].copy(), gains[:used].copy(), costs[:used].copy(), least[:used].copy(), bought, starts


def _cell_candidates(
    factors: Any,
    spreads: Any,
    energies: Any,
    correlations: Any,
    givers: Any,
    is_open: Any,
    prices: Any,
    shares: Any,
    unbought: Any,
    cells_per_block: int,
    cell: int,
) -> Any:
    """Return costs, errors and states of all candidates of one cell."""
    terms = Terms(factors, spreads, energies, correlations, givers, is_open, prices, shares, unbought, cells_per_block)
    room = scratch(factors.size, prices.shape[2])
    block = cell // cells_per_block
    beside = unbought[block] if cell == _carrier(terms, block, room) else 0.0
    count = gather_items(terms, cell, room)
    points = candidates(terms, cell, count, beside, room)
    states = np.empty((points, factors.size), np.uint8)
    for point in range(points):
        write_state(terms, cell, count, room.codes[point], room, states[point])
    return room.costs[:points].copy(), room.errors[:points].copy(), states


def _fill(
    order: Any,
    position: int,
    slopes: Any,
    costs: Any,
    least: Any,
    chains: Any,
    starts: Any,
    taken: Any,
    rest: int,
    until: float,
) -> Any:
    """Take steps in order from ``position`` on, while they are worth ``until`` for a byte, where they fit in ``rest``.

    ``taken`` counts the steps of each chain that are taken; a chain whose next step does not fit takes no other.
    Returns the position and rest that are reached, and the chain whose next step does not fit while something cheaper
    of its cell would, or NOTHING_FITS.
    """
    for index in range(position, order.size):
        step = order[index]
        if rest == 0 or slopes[step] < until:
            return index, rest, NOTHING_FITS
        chain = chains[step]
        if step != starts[chain] + taken[chain]:
            continue
        if costs[step] <= rest:
            taken[chain] += 1
            rest -= costs[step]
        elif least[step] <= rest:
            return index + 1, rest, chain
    return order.size, rest, NOTHING_FITS


@inlined
def _draw_together(cosines: Any, one: int, other: int, size: int) -> None:
    """Draw the cosines of two inputs towards their mean over the blocks in which both differ from the base."""
    total, squares, count = 0.0, 0.0, 0
    for block in range(len(cosines)):
        if cosines[block, one, one] > 0 and cosines[block, other, other] > 0:
            total += cosines[block, one, other]
            count += 1
    if count < 2:
        return
    mean = total / count
    for block in range(len(cosines)):
        if cosines[block, one, one] > 0 and cosines[block, other, other] > 0:
            squares += (cosines[block, one, other] - mean) ** 2
    by_chance = (1.0 - mean * mean) ** 2 / size * (count - 1)
    kept = 0.0 if squares <= by_chance else 1.0 - by_chance / squares
    for block in range(len(cosines)):
        if cosines[block, one, one] > 0 and cosines[block, other, other] > 0:
            cosine = np.float32(mean + kept * (cosines[block, one, other] - mean))
            cosines[block, one, other] = cosine
            cosines[block, other, one] = cosine


def _cosines(sketches: Any) -> Any:
    """Return the cosines (float32 [b, n, n]) between the sketches (int8 [n, b, size])."""
    inputs, blocks, size = sketches.shape
    cosines = np.zeros((blocks, inputs, inputs), np.float32)
    products = np.empty((inputs, inputs), np.int64)
    for block in range(blocks):
        for one in range(inputs):
            for other in range(one + 1):
                total = np.int32(0)
                for entry in range(size):
                    total += np.int32(sketches[one, block, entry]) * np.int32(sketches[other, block, entry])
                products[one, other] = total
            for other in range(one + 1):
                lengths = np.float64(products[one, one]) * np.float64(products[other, other])
                if lengths > 0.0:
                    cosine = np.float32(products[one, other] / np.sqrt(lengths))
                    cosines[block, one, other] = cosine
                    cosines[block, other, one] = cosine
    for one in range(inputs):
        for other in range(one):
            _draw_together(cosines, one, other, size)
    return cosines


def _array(element: Any, dimensions: int) -> Any:
    """Return the type of a contiguous array."""
    return types.Array(element, dimensions, "C")


def _read_only(element: Any) -> Any:
    """Return the type of a contiguous array of one dimension that is not to be written to."""
    return types.Array(element, 1, "C", readonly=True)


_OFFER: Final = (
    _array(types.float64, 1),
    _array(types.float64, 1),
    _array(types.float64, 2),
    _array(types.float32, 3),
    _array(types.int16, 2),
    _array(types.boolean, 2),
    _array(types.int64, 3),
    _array(types.float32, 3),
    _array(types.float64, 1),
    types.int64,
)
_INTEGERS: Final = _array(types.int64, 1)

TENSOR_CHAINS: Final = ReturningKernel(_tensor_chains, _OFFER)
CELL_CANDIDATES: Final = ReturningKernel(_cell_candidates, (*_OFFER, types.int64))
FILL: Final = ReturningKernel(
    _fill,
    (
        _INTEGERS,
        types.int64,
        _read_only(types.float64),
        _read_only(types.int64),
        _read_only(types.int64),
        _array(types.int32, 1),
        _INTEGERS,
        _INTEGERS,
        types.int64,
        types.float64,
    ),
)
COSINES: Final = ReturningKernel(_cosines, (_array(types.int8, 3),))
