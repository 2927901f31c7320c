"""The states of one cell that may be bought, and the lower convex hull of their costs and errors, compiled.

A state says at which level each item of the cell is. Items are inputs with bytes of their own.
"""

from typing import Any, NamedTuple

import numpy as np

from mergefs.kernels.fused.marks import inlined

EXACT_ITEMS = 8
"""Up to so many items that are bought whole or not at all every set of them is looked at."""


class Terms(NamedTuple):
    """The arrays of an ``Offer``."""

    factors: Any
    spreads: Any
    energies: Any
    correlations: Any
    givers: Any
    is_open: Any
    prices: Any
    shares: Any
    unbought: Any
    cells_per_block: Any


class Scratch(NamedTuple):
    """Room for the items and the candidates of one cell.

    Each of the ``items`` has a number of ``rungs``: the levels on the lower convex hull of its own prices and shares.
    Candidates have costs, errors and a code: the set of bought items, or how many ``moves`` lead there.
    """

    items: Any
    matrix: Any
    rungs: Any
    rung_levels: Any
    rung_prices: Any
    rung_shares: Any
    position: Any
    weights: Any
    move_items: Any
    move_levels: Any
    set_errors: Any
    costs: Any
    errors: Any
    codes: Any
    vertices: Any
    least: Any


@inlined
def scratch(inputs: int, levels: int) -> Any:
    """Return room for cells of so many inputs and levels."""
    points = 1 + max(1 << min(inputs, EXACT_ITEMS), inputs * (levels - 1))
    moves = 1 + inputs * (levels - 1)
    return Scratch(
        np.empty(inputs, np.int64),
        np.empty((inputs, inputs), np.float64),
        np.empty(inputs, np.int64),
        np.empty((inputs, levels), np.int64),
        np.empty((inputs, levels), np.int64),
        np.empty((inputs, levels), np.float64),
        np.empty(inputs, np.int64),
        np.empty(inputs, np.float64),
        np.empty(moves, np.int64),
        np.empty(moves, np.int64),
        np.empty(1 << min(inputs, EXACT_ITEMS), np.float64),
        np.empty(points, np.int64),
        np.empty(points, np.float64),
        np.empty(points, np.int64),
        np.empty(points, np.int64),
        np.empty(points, np.int64),
    )


@inlined
def gather_items(terms: Any, cell: int, room: Any) -> int:
    """Find the items of a cell that the error depends on, with their Gram matrix, and return how many there are."""
    block = cell // terms.cells_per_block
    inputs = terms.factors.size
    count = 0
    for item in range(inputs):
        if not terms.is_open[item, block] or terms.givers[item, block] != item:
            continue
        factor, spread = 0.0, 0.0
        for other in range(item, inputs):
            if terms.givers[other, block] == item:
                factor += terms.factors[other]
                spread += terms.spreads[other]
        energy = terms.energies[item, cell]
        if (factor * factor + spread) * energy <= 0.0:
            continue
        room.items[count] = item
        room.weights[count] = factor * np.sqrt(energy)
        room.matrix[count, count] = (factor * factor + spread) * energy
        for other in range(count):
            cosine = np.float64(terms.correlations[block, item, room.items[other]])
            product = room.weights[count] * room.weights[other] * cosine
            room.matrix[count, other] = product
            room.matrix[other, count] = product
        count += 1
    return count


@inlined
def subset_candidates(terms: Any, cell: int, count: int, beside: float, room: Any) -> int:
    """Write the sets of items that may be bought as candidates and return their number; the first is the empty one.

    These are all of them, or where all have one price the best of each size.
    """
    last = terms.prices.shape[2] - 1
    sets = 1 << count
    errors = room.set_errors  # of what is left out, by the set that is left out
    errors[0] = 0.0
    for left in range(1, sets):
        item = 0
        while not (left >> item) & 1:
            item += 1
        rest = left & (left - 1)
        cross = 0.0
        for other in range(item + 1, count):
            if (rest >> other) & 1:
                cross += room.matrix[item, other]
        errors[left] = max(errors[rest] + room.matrix[item, item] + 2.0 * cross, 0.0)
    errors[sets - 1] += beside
    price = terms.prices[room.items[0], cell, last]
    same = True
    for item in range(1, count):
        same = same and terms.prices[room.items[item], cell, last] == price
    if same:
        for size in range(count + 1):
            room.costs[size] = size * price
            room.codes[size] = -1
        for bought in range(sets):
            size = 0
            for item in range(count):
                size += (bought >> item) & 1
            if room.codes[size] < 0 or errors[sets - 1 - bought] < room.errors[size]:
                room.codes[size] = bought
                room.errors[size] = errors[sets - 1 - bought]
        return count + 1
    for bought in range(sets):
        cost = np.int64(0)
        for item in range(count):
            if (bought >> item) & 1:
                cost += terms.prices[room.items[item], cell, last]
        room.costs[bought] = cost
        room.codes[bought] = bought
        room.errors[bought] = errors[sets - 1 - bought]
    return sets


@inlined
def find_rungs(terms: Any, cell: int, count: int, room: Any) -> None:
    """Find for each item the levels that are worth buying: the error is linear in the share of one item."""
    levels = terms.prices.shape[2]
    for index in range(count):
        item = room.items[index]
        found, current = 1, 0
        room.rung_levels[index, 0] = 0
        room.rung_prices[index, 0] = 0
        room.rung_shares[index, 0] = 1.0
        while True:
            best, steepest = -1, 0.0
            for level in range(1, levels):
                extra = terms.prices[item, cell, level] - room.rung_prices[index, current]
                fall = room.rung_shares[index, current] - np.float64(terms.shares[item, cell, level])
                if extra > 0 and fall > 0.0 and fall / extra > steepest:
                    best, steepest = level, fall / extra
            if best < 0:
                break
            current = found
            room.rung_levels[index, found] = best
            room.rung_prices[index, found] = terms.prices[item, cell, best]
            room.rung_shares[index, found] = np.float64(terms.shares[item, cell, best])
            found += 1
        room.rungs[index] = found


@inlined
def path_candidates(terms: Any, cell: int, count: int, beside: float, room: Any) -> int:
    """Write the states along one way from nothing to all as candidates and return their number.

    Each move takes an item to its next rung, or two items that cancel each other to the next or the last one, whatever
    removes the most error for its price.
    """
    find_rungs(terms, cell, count, room)
    error = beside
    for item in range(count):
        room.position[item] = 0
        room.weights[item] = room.matrix[item, item]  # how fast the error falls with the share of this item
        error += room.matrix[item, item]
        for other in range(count):
            if other != item:
                room.weights[item] += 2.0 * room.matrix[item, other]
                if other < item:
                    error += 2.0 * room.matrix[item, other]
    room.costs[0] = 0
    room.errors[0] = max(error, 0.0)
    room.codes[0] = 0
    points, moves = 1, 0
    cost = np.int64(0)
    while True:
        first, second, first_rung, second_rung = -1, -1, 0, 0
        steepest, best_gain, best_price = 0.0, 0.0, np.int64(0)
        for item in range(count):
            here = room.position[item]
            if here + 1 >= room.rungs[item]:
                continue
            price = room.rung_prices[item, here + 1] - room.rung_prices[item, here]
            fall = room.rung_shares[item, here] - room.rung_shares[item, here + 1]
            gain = room.weights[item] * fall + beside
            if first < 0 or gain / price > steepest:
                steepest, best_gain, best_price = gain / price, gain, price
                first, first_rung, second = item, here + 1, -1
            for other in range(item):
                there = room.position[other]
                if room.matrix[item, other] >= 0.0 or there + 1 >= room.rungs[other]:
                    continue
                for to_the_end in range(2):
                    to = room.rungs[item] - 1 if to_the_end else here + 1
                    other_to = room.rungs[other] - 1 if to_the_end else there + 1
                    price = room.rung_prices[item, to] - room.rung_prices[item, here]
                    price += room.rung_prices[other, other_to] - room.rung_prices[other, there]
                    fall = room.rung_shares[item, here] - room.rung_shares[item, to]
                    other_fall = room.rung_shares[other, there] - room.rung_shares[other, other_to]
                    gain = room.weights[item] * fall + room.weights[other] * other_fall + beside
                    gain -= 2.0 * room.matrix[item, other] * fall * other_fall
                    if gain / price > steepest:
                        steepest, best_gain, best_price = gain / price, gain, price
                        first, first_rung, second, second_rung = item, to, other, other_to
        if first < 0:
            break
        moves = _move(count, first, first_rung, moves, room)
        if second >= 0:
            moves = _move(count, second, second_rung, moves, room)
        beside = 0.0
        error -= best_gain
        cost += best_price
        room.costs[points] = cost
        room.errors[points] = max(error, 0.0)
        room.codes[points] = moves
        points += 1
    room.errors[points - 1] = 0.0  # all of everything; what the sum leaves is rounding
    return points


@inlined
def _move(count: int, item: int, rung: int, moves: int, room: Any) -> int:
    """Take an item to a rung, and return the number of moves."""
    fall = room.rung_shares[item, room.position[item]] - room.rung_shares[item, rung]
    for other in range(count):
        if other != item:
            room.weights[other] -= 2.0 * room.matrix[item, other] * fall
    room.position[item] = rung
    room.move_items[moves] = item
    room.move_levels[moves] = room.rung_levels[item, rung]
    return moves + 1


@inlined
def candidates(terms: Any, cell: int, count: int, beside: float, room: Any) -> Any:
    """Write the candidates of a cell with items and return their number; the first one is to buy nothing."""
    if terms.prices.shape[2] == 2 and count <= EXACT_ITEMS:
        return subset_candidates(terms, cell, count, beside, room)
    return path_candidates(terms, cell, count, beside, room)


@inlined
def write_state(terms: Any, cell: int, count: int, code: int, room: Any, state: Any) -> None:
    """Write the level of every input in a candidate; inputs with an item's bytes are at its level."""
    block = cell // terms.cells_per_block
    state[:] = 0
    if terms.prices.shape[2] == 2 and count <= EXACT_ITEMS:
        for item in range(count):
            if (code >> item) & 1:
                state[room.items[item]] = 1
    else:
        for move in range(code):
            state[room.items[room.move_items[move]]] = room.move_levels[move]
    for other in range(state.size):
        if terms.is_open[other, block]:
            state[other] = state[terms.givers[other, block]]


@inlined
def find_hull(points: int, room: Any) -> int:
    """Find the candidates on the lower convex hull and return how many there are beside the first.

    ``vertices`` names them; ``least`` is for each the smallest price at which any candidate improves on the one before.
    """
    found, current = 0, 0
    while True:
        best, steepest, least = -1, 0.0, np.int64(0)
        for point in range(points):
            price = room.costs[point] - room.costs[current]
            gain = room.errors[current] - room.errors[point]
            if price <= 0 or gain <= 0.0:
                continue
            if best < 0 or price < least:
                least = price
            slope = gain / price
            if best < 0 or slope > steepest or (slope == steepest and price < room.costs[best] - room.costs[current]):
                best, steepest = point, slope
        if best < 0:
            return found
        room.vertices[found] = best
        room.least[found] = least
        found += 1
        current = best
