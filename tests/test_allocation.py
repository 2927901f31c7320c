"""Which bytes a budget buys, on numbers alone: the objective, the cap, what a dynamic programme would have bought."""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergefs.planner.allocation import Allocation, Offer, allocate, correlations, steps, together
from mergefs.planner.allocation.chains import chains_of
from mergefs.planner.allocation.steps import sum_in_order

QUICK = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


# Offers made up -------------------------------------------------------------------------------------------------------


def deltas_of(rng: np.random.Generator, inputs: int, blocks: int, cancelling: bool) -> NDArray[np.float64]:
    """Return sketches (n, b, 32) of deltas of any size, of which some repeat or cancel others."""
    deltas = rng.standard_normal((inputs, blocks, 32)) * np.exp(rng.normal(0, 1, (inputs, blocks, 1)))
    deltas += rng.normal(0, 1) * rng.standard_normal((1, blocks, 32))
    if cancelling:
        for block in range(blocks):
            one, other = rng.choice(inputs, 2, replace=False)
            noise = rng.uniform(0, 0.5) * rng.standard_normal(32)
            deltas[other, block] = rng.choice([-1.0, 1.0]) * deltas[one, block] + noise
    return deltas


def offer_of(
    deltas: NDArray[np.float64],
    prices: NDArray[np.int64],
    factors: Sequence[float] | None = None,
    **others: object,
) -> Offer:
    """Return an offer of whole blocks of ``deltas`` (n, b, size) for ``prices`` (n, b)."""
    inputs, blocks, _ = deltas.shape
    gram = np.einsum("ibk,jbk->bij", deltas, deltas)
    lengths = np.sqrt(np.einsum("bii->bi", gram))
    made = Offer(
        factors=np.ones(inputs) if factors is None else np.array(factors, dtype=np.float64),
        spreads=np.zeros(inputs),
        energies=np.einsum("bii->ib", gram).copy(),
        correlations=(gram / (lengths[:, :, None] * lengths[:, None, :])).astype(np.float32),
        givers=np.repeat(np.arange(inputs, dtype=np.int16)[:, None], blocks, axis=1),
        is_open=np.ones((inputs, blocks), dtype=np.bool_),
        prices=np.stack([np.zeros_like(prices), prices], axis=-1),
        shares=np.stack([np.ones_like(prices), np.zeros_like(prices)], axis=-1).astype(np.float32),
        unbought=np.zeros(blocks),
    )
    return replace(made, **others)  # type: ignore[arg-type]


def any_offer(rng: np.random.Generator) -> Offer:
    """Return an offer with anything in it: levels, cells, shared bytes, closed blocks, an error beside the deltas'."""
    inputs, blocks, per_block = int(rng.integers(1, 11)), int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 4]))
    levels = int(rng.choice([2, 2, 5]))
    cells = blocks * per_block - int(rng.integers(0, per_block))
    deltas = deltas_of(rng, inputs, blocks, inputs > 1)
    givers = np.repeat(np.arange(inputs, dtype=np.int16)[:, None], blocks, axis=1)
    is_open = rng.random((inputs, blocks)) < 0.8
    for block, _ in itertools.product(range(blocks), range(inputs // 3)):
        one, other = sorted(rng.choice(inputs, 2, replace=False))
        if givers[one, block] == one and (givers[:, block] == other).sum() == 1:
            givers[other, block] = one
            deltas[other, block] = deltas[one, block]
            is_open[other, block] = is_open[one, block]
    part = rng.uniform(0.1, 1, (inputs, cells))
    block_of = np.arange(cells) // per_block
    whole = rng.integers(1, 200, (inputs, cells))
    prices, shares = np.zeros((inputs, cells, levels), np.int64), np.ones((inputs, cells, levels), np.float32)
    for level in range(1, levels - 1):
        prices[:, :, level] = whole * level // levels + 1
        shares[:, :, level] = rng.uniform(0.15, 0.4, (inputs, cells)) ** level
    prices[:, :, -1], shares[:, :, -1] = whole, 0
    energies = np.einsum("ibk,ibk->ib", deltas, deltas)[:, block_of] * part
    for block in range(blocks):
        for other in range(inputs):
            of_block = block_of == block
            for array in (energies, prices, shares):
                array[other, of_block] = array[givers[other, block], of_block]
    whole_blocks = offer_of(deltas, np.ones((inputs, blocks), np.int64), rng.normal(0.3, 1, inputs))
    return replace(
        whole_blocks,
        spreads=rng.choice([0.0, 1.0], inputs) * rng.random(inputs),
        energies=energies,
        givers=givers,
        is_open=is_open,
        prices=prices,
        shares=shares,
        unbought=rng.choice([0.0, 1.0]) * rng.random(blocks) * 20,
        cells_per_block=per_block,
    )


def expected_error(offer: Offer, levels: NDArray[np.uint8]) -> float:
    """Return the objective as ``Offer`` writes it down, term by term."""
    total = 0.0
    for cell in range(levels.shape[1]):
        block = cell // offer.cells_per_block
        found = [item for item in range(len(levels)) if offer.is_open[item, block]]
        left = {item: float(offer.shares[item, cell, levels[item, cell]]) for item in found}
        for one, other in itertools.product(found, found):
            if one == other:
                total += (offer.factors[one] ** 2 + offer.spreads[one]) * left[one] * offer.energies[one, cell]
                continue
            product = offer.factors[one] * offer.factors[other]
            if offer.givers[one, block] == offer.givers[other, block]:  # the very same error
                total += product * left[one] * offer.energies[one, cell]
            else:
                length = np.sqrt(offer.energies[one, cell] * offer.energies[other, cell])
                cosine = float(offer.correlations[block, one, other])
                total += product * left[one] * left[other] * cosine * length
    for block in range(len(offer.unbought)):
        cells = slice(block * offer.cells_per_block, (block + 1) * offer.cells_per_block)
        if offer.is_open[:, block].any() and not levels[:, cells].any():
            total += offer.unbought[block]
    return total


def price_of(offer: Offer, levels: NDArray[np.uint8]) -> int:
    """Return what a state costs: every giver's bytes once."""
    own = offer.for_sale
    chosen = np.take_along_axis(offer.prices, levels[:, :, None].astype(np.int64), axis=2)[:, :, 0]
    return int(chosen[own].sum())


def price_of_all(offers: Sequence[Offer]) -> int:
    return sum(offer.price_of_all for offer in offers)


def check(offers: Sequence[Offer], limit: int) -> Allocation:
    """Return what is bought for ``limit`` after holding it to what every allocation promises."""
    bought = allocate(offers, limit)
    assert bought.spent == sum(map(price_of, offers, bought.levels)) <= limit
    error = sum(map(expected_error, offers, bought.levels))
    assert error <= bought.left + 1e-6 * bought.total
    if all(offer.cells_per_block == 1 for offer in offers):
        assert error == pytest.approx(bought.left, abs=1e-6 * bought.total)
    for offer, levels in zip(offers, bought.levels, strict=True):
        is_open = np.repeat(offer.is_open, offer.cells_per_block, axis=1)[:, : levels.shape[1]]
        givers = np.repeat(offer.givers, offer.cells_per_block, axis=1)[:, : levels.shape[1]]
        assert not levels[~is_open].any()
        assert (levels == np.take_along_axis(levels, givers.astype(np.int64), axis=0)).all()
    return bought


# The cap, and more for more -------------------------------------------------------------------------------------------


@given(seed=SEEDS, shares=st.lists(st.floats(0, 1.05), min_size=2, max_size=6))
@QUICK
def test_the_cap_holds_and_a_larger_budget_never_leaves_a_larger_error(seed: int, shares: list[float]) -> None:
    rng = np.random.default_rng(seed)
    offers = [any_offer(rng) for _ in range(int(rng.integers(1, 5)))]
    limits = sorted(int(share * price_of_all(offers)) for share in shares)
    found = [check(offers, limit) for limit in limits]
    for less, more in itertools.pairwise(found):
        assert more.left <= less.left + 1e-6 * less.total


@given(seed=SEEDS)
@QUICK
def test_nothing_is_bought_for_nothing_and_everything_for_its_price(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offers = [any_offer(rng) for _ in range(3)]
    nothing = check(offers, 0)
    assert not any(levels.any() for levels in nothing.levels)
    assert nothing.left == pytest.approx(nothing.total)
    whole = check(offers, price_of_all(offers))
    assert whole.complete
    assert (whole.spent, whole.left) == (price_of_all(offers), 0)
    for offer, levels in zip(offers, whole.levels, strict=True):
        assert np.array_equal(levels, offer.everything)


@given(seed=SEEDS, share=st.floats(0, 1))
@QUICK
def test_what_is_bought_depends_on_nothing_but_the_offers(seed: int, share: float) -> None:
    def offers() -> list[Offer]:
        rng = np.random.default_rng(seed)
        return [any_offer(rng) for _ in range(4)]

    class Made(Sequence[Offer]):
        """Offers that are made anew whenever they are asked for."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            return offers()[index]

    limit = int(share * price_of_all(offers()))
    first, second = allocate(offers(), limit), allocate(Made(), limit)
    assert (first.spent, first.left, first.total) == (second.spent, second.left, second.total)
    assert all(map(np.array_equal, first.levels, second.levels))


def test_what_is_worth_the_same_is_bought_in_the_order_of_tensors_and_blocks() -> None:
    alike = offer_of(np.ones((1, 3, 4)), np.full((1, 3), 10))
    bought = check([alike, alike], 40)
    assert [levels.tolist() for levels in bought.levels] == [[[1, 1, 1]], [[1, 0, 0]]]


def test_what_changes_nothing_is_not_bought() -> None:
    still = np.zeros((1, 2, 4))
    still[0, 1] = 1
    offer = offer_of(still + 1e-30, np.full((1, 2), 10), energies=np.array([[0.0, 4.0]]))
    assert check([offer], 19).levels[0].tolist() == [[0, 1]]
    assert check([replace(offer, factors=np.zeros(1))], 19).levels[0].tolist() == [[0, 0]]


# Experts that repeat or cancel each other -----------------------------------------------------------------------------


def test_inputs_with_the_same_bytes_are_one_with_the_sum_of_their_factors_and_one_price() -> None:
    rng = np.random.default_rng(1)
    deltas = rng.standard_normal((3, 1, 32))
    deltas[2] = deltas[0]
    offer = offer_of(deltas, np.full((3, 1), 10), [0.5, 0.6, 0.4], givers=np.array([[0], [1], [0]], np.int16))
    assert offer.price_of_all == 20
    assert check([offer], 10).levels[0].tolist() == [[1], [0], [1]]
    assert check([offer], 20).complete


@pytest.mark.parametrize("inputs", [4, 10])
def test_experts_that_cancel_each_other_are_bought_together_or_not_at_all(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    deltas = rng.standard_normal((inputs, 5, 32))
    deltas[1::2] = 0.2 * deltas[1::2] - deltas[::2]
    offer = offer_of(deltas, np.full((inputs, 5), 10))
    for limit in range(0, offer.price_of_all + 1, 10):
        bought = check([offer], limit).levels[0]
        assert np.array_equal(bought[::2], bought[1::2])


@given(seed=SEEDS)
@QUICK
def test_every_set_of_up_to_eight_experts_is_considered(seed: int) -> None:
    """At the prices on the hull nothing that any set removes for that price, or less, is missed."""
    rng = np.random.default_rng(seed)
    inputs = int(rng.integers(2, 9))
    offer = offer_of(
        deltas_of(rng, inputs, 1, cancelling=True), rng.integers(1, 9, (inputs, 1)), rng.normal(0, 1, inputs)
    )
    states = [np.array(state, np.uint8)[:, None] for state in itertools.product([0, 1], repeat=inputs)]
    known = [(price_of(offer, state), expected_error(offer, state)) for state in states]
    for limit in np.cumsum(chains_of(offer).costs):
        best = min(error for price, error in known if price <= limit)
        assert check([offer], int(limit)).left == pytest.approx(best, abs=1e-6 * known[0][1])


def best_by_dynamic_programme(offers: Sequence[Offer], limits: Sequence[int], grid: int) -> list[float]:
    """Return the most error that sets of whole blocks can remove within each limit, prices rounded down to ``grid``."""
    width = max(limits) // grid + 1
    best = np.zeros(width)
    for offer in offers:
        lengths = offer.factors[:, None] * np.sqrt(offer.energies)
        gram = np.einsum("bij,ib,jb->bij", offer.correlations.astype(np.float64), lengths, lengths)
        sets = np.array(list(itertools.product([0, 1], repeat=len(lengths))))
        errors = np.einsum("bij,si,sj->sb", gram, 1 - sets, 1 - sets)
        costs = sets @ offer.prices[:, :, 1] // grid
        for block in range(costs.shape[1]):
            options = [best]
            for cost, error in zip(costs[1:, block], errors[1:, block], strict=True):
                moved = np.full(width, -np.inf)
                moved[min(cost, width) :] = best[: max(width - cost, 0)] + errors[0, block] - error
                options.append(moved)
            best = np.max(options, axis=0)
    return [float(best[limit // grid]) for limit in limits]


BUDGETS = (0.0625, 0.125, 0.25, 0.5, 0.75, 0.9)


@given(seed=SEEDS, inputs=st.integers(2, 4), equal_prices=st.booleans())
@settings(max_examples=12, deadline=None)
def test_99_percent_of_what_a_dynamic_programme_removes_is_removed(seed: int, inputs: int, equal_prices: bool) -> None:
    rng = np.random.default_rng(seed)
    offers = []
    for _ in range(4):
        prices = np.full((inputs, 60), 1000) if equal_prices else rng.integers(200, 2000, (inputs, 60))
        factors = rng.normal(0, 1, inputs)
        offers.append(offer_of(deltas_of(rng, inputs, 60, cancelling=True), prices, factors))
    limits = [int(share * price_of_all(offers)) for share in BUDGETS]
    for limit, best in zip(limits, best_by_dynamic_programme(offers, limits, 20), strict=True):
        bought = check(offers, limit)
        assert bought.total - bought.left >= 0.99 * best


# Angles between deltas ------------------------------------------------------------------------------------------------


@given(seed=SEEDS, inputs=st.integers(1, 9), blocks=st.integers(0, 1))
@QUICK
def test_cosines_of_sketches_are_those_of_their_exact_inner_products(seed: int, inputs: int, blocks: int) -> None:
    rng = np.random.default_rng(seed)
    sketches = rng.integers(-127, 128, (inputs, blocks, 128), dtype=np.int8)
    sketches[: inputs // 2] //= 100  # few values, and zeros
    found = correlations(list(sketches))
    exact = np.einsum("ibk,jbk->bij", sketches.astype(np.int64), sketches.astype(np.int64))
    lengths = np.sqrt(np.einsum("bii->bi", exact).astype(np.float64))
    products = lengths[:, :, None] * lengths[:, None, :]
    assert np.allclose(found, np.divide(exact, products, out=np.zeros_like(products), where=products > 0), atol=1e-6)


def test_equal_sketches_have_cosine_one_and_empty_ones_none() -> None:
    one = np.arange(-64, 64, dtype=np.int8)[None]
    found = correlations([one, one.copy(), -one, np.zeros_like(one)])[0]
    assert found.tolist() == [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]


@given(seed=SEEDS, cosine=st.floats(-0.9, 0.9))
@QUICK
def test_cosines_that_differ_by_chance_alone_become_their_mean_and_others_stay(seed: int, cosine: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((2, 200, 128))
    other = cosine * one + np.sqrt(1 - cosine**2) * other
    both = [np.rint(values * 30).clip(-127, 127).astype(np.int8) for values in (one, other)]
    alike = correlations(both)[:, 0, 1]
    assert np.abs(alike - cosine).mean() < 0.03
    assert alike.std() < 0.03
    both[1][::2] *= -1
    assert np.abs(np.abs(correlations(both)[:, 0, 1]) - abs(cosine)).max() < 0.5
    both[1][1::2] = both[0][1::2]
    assert np.abs(correlations(both)[1::2, 0, 1] - 1).max() < 0.05


# Cells and levels -----------------------------------------------------------------------------------------------------


def test_rate_goes_to_the_cells_whose_error_falls_fastest() -> None:
    """As the theory of rate and distortion has it: one slope for all cells, and none for those with less energy."""
    planes, cells = 6, 64
    energies = np.exp2(np.random.default_rng(0).uniform(-8, 8, (1, cells)))
    price = np.arange(planes + 2) * 100
    prices = np.broadcast_to(price, (1, cells, planes + 2)).astype(np.int64)
    shares = np.broadcast_to(np.append(0.25 ** np.arange(planes + 1), 0), (1, cells, planes + 2)).astype(np.float32)
    block = offer_of(np.ones((1, 1, 1)), np.ones((1, 1), np.int64))
    offer = replace(block, energies=energies, prices=prices, shares=shares, cells_per_block=cells)
    for limit in (1_000, 5_000, 12_345, 30_000):
        levels = check([offer], limit).levels[0][0]
        following = energies[0] * (shares[0, :, 0] * 0.25**levels - shares[0, :, 0] * 0.25 ** (levels + 1.0))
        last = energies[0] * (0.25 ** (levels - 1.0) - 0.25**levels)
        open_end, begun = (levels < planes), (levels > 0) & (levels <= planes)
        assert last[begun].min() >= following[open_end].max() * (1 - 1e-6)


@given(seed=SEEDS)
@QUICK
def test_a_way_of_moves_finds_nearly_what_all_sets_have(seed: int) -> None:
    """A level that costs nothing and brings nothing makes cells go by moves; whole blocks stay what can be bought."""
    rng = np.random.default_rng(seed)
    inputs = int(rng.integers(2, 7))
    exact = offer_of(deltas_of(rng, inputs, 60, cancelling=True), rng.integers(200, 2000, (inputs, 60)))
    moves = replace(exact, prices=np.insert(exact.prices, 1, 0, axis=2), shares=np.insert(exact.shares, 1, 1, axis=2))
    for share in BUDGETS:
        limit = int(share * exact.price_of_all)
        all_sets, way = check([exact], limit), check([moves], limit)
        assert way.total == pytest.approx(all_sets.total)
        assert way.total - way.left >= 0.97 * (all_sets.total - all_sets.left)


def test_what_a_block_has_beside_its_deltas_is_gone_with_its_first_purchase() -> None:
    deltas = np.ones((1, 2, 1))
    offer = offer_of(deltas, np.full((1, 2), 10), unbought=np.array([0.0, 5.0]))
    assert check([offer], 10).levels[0].tolist() == [[0, 1]]
    cells = replace(
        offer,
        energies=np.array([[1.0, 3.0, 1.0, 2.0]]),
        prices=np.array([[[0, 10]] * 4]),
        shares=np.array([[[1, 0]] * 4], np.float32),
        cells_per_block=2,
    )
    order = [check([cells], limit) for limit in (10, 20, 30, 40)]
    assert [each.levels[0][0].tolist() for each in order] == [[0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert [each.left for each in order] == pytest.approx([5, 2, 1, 0])
    assert order[0].total == pytest.approx(12)


# All inputs at once ---------------------------------------------------------------------------------------------------


@given(seed=SEEDS)
@QUICK
def test_inputs_that_are_bought_together_cost_and_are_worth_what_they_do_one_by_one(seed: int) -> None:
    offer = any_offer(np.random.default_rng(seed))
    one = together(offer)
    nothing = np.zeros(offer.energies.shape, dtype=np.uint8)
    assert expected_error(one, np.zeros(one.energies.shape, dtype=np.uint8)) == pytest.approx(
        expected_error(offer, nothing), rel=1e-6, abs=1e-6
    )
    assert expected_error(one, one.everything) == 0
    assert one.price_of_all == offer.price_of_all
    assert one.levels == offer.levels
    assert allocate([one], offer.price_of_all).complete


@given(seed=SEEDS)
@QUICK
def test_a_level_that_one_of_them_lacks_is_not_for_sale_together(seed: int) -> None:
    offer = any_offer(np.random.default_rng(seed))
    if offer.levels < 3 or not offer.for_sale.any():
        return
    item, cell = map(int, np.argwhere(offer.for_sale)[0])
    prices, shares = offer.prices.copy(), offer.shares.copy()
    prices[item, cell, 1], shares[item, cell, 1] = 0, 1
    one = together(replace(offer, prices=prices, shares=shares))
    assert one.prices[0, cell, 1] == 0
    assert one.shares[0, cell, 1] == 1
    assert one.prices[0, cell, -1] == offer.prices[offer.for_sale[:, cell], cell, -1].sum()


@QUICK
@given(seed=SEEDS)
def test_what_is_kept_in_files_is_bought_as_what_is_kept_in_memory(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offers = [any_offer(rng) for _ in range(int(rng.integers(1, 4)))]
    limit = int(rng.uniform(0, 1.1) * sum(offer.price_of_all for offer in offers))
    held = allocate(offers, limit)
    with tempfile.TemporaryDirectory() as directory:
        spilled = allocate(offers, limit, Path(directory))
        assert list(Path(directory).iterdir()) == [], "files without names leave nothing behind"
    assert (spilled.spent, spilled.total, spilled.left) == (held.spent, held.total, held.left)
    for one, other in zip(spilled.levels, held.levels, strict=True):
        assert np.array_equal(one, other)


@given(numbers=st.lists(st.floats(-1e6, 1e6), max_size=30))
def test_sums_are_those_of_one_number_after_the_other(numbers: list[float]) -> None:
    expected = 0.0
    for number in numbers:
        expected += number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_CHUNK", 7)
        assert sum_in_order(np.array(numbers, dtype=np.float64)) == expected
