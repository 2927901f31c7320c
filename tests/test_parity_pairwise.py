"""The generator of the parity matrix leaves out no pair of values that can be together."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from parity_pairwise import Row, cover, pairs, pairs_of

FACTORS = st.dictionaries(
    st.text("abcdefg", min_size=1, max_size=2),
    st.lists(st.text("vwxyz", min_size=1, max_size=2), min_size=1, max_size=4, unique=True),
    min_size=2,
    max_size=5,
)


def covered_by(rows: tuple[Row, ...]) -> set[object]:
    return {pair for row in rows for pair in pairs_of(row)}


@given(factors=FACTORS)
def test_every_pair_of_values_is_in_some_row(factors: dict[str, list[str]]) -> None:
    covering = cover(factors)
    assert covered_by(covering.rows) == set(pairs(factors))
    assert covering.impossible == {}


@given(factors=FACTORS)
def test_a_row_has_one_value_for_each_factor_in_their_order(factors: dict[str, list[str]]) -> None:
    for row in cover(factors).rows:
        assert list(row) == list(factors)
        assert all(row[name] in values for name, values in factors.items())


@given(factors=FACTORS)
def test_the_first_rows_add_most_and_they_are_always_the_same(factors: dict[str, list[str]]) -> None:
    rows = cover(factors).rows
    assert cover(factors).rows == rows
    seen: set[object] = set()
    for number, row in enumerate(rows):
        adds = set(pairs_of(row)) - seen
        assert all(len(adds) >= len(set(pairs_of(later)) - seen) for later in rows[number:])
        seen |= adds


@given(factors=FACTORS, data=st.data())
def test_pairs_that_are_left_out_are_in_no_allowed_row(factors: dict[str, list[str]], data: st.DataObject) -> None:
    names = list(factors)
    forbidden = tuple(
        (name, data.draw(st.sampled_from(factors[name])))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    )

    def allowed(row: Row) -> bool:
        return any(row[name] != value for name, value in forbidden)

    covering = cover(factors, allowed)
    every_row = [dict(zip(names, values, strict=True)) for values in product(*factors.values())]
    possible = covered_by(tuple(row for row in every_row if allowed(row)))
    assert all(allowed(row) for row in covering.rows)
    assert covered_by(covering.rows) == possible
    assert set(covering.impossible) == set(pairs(factors)) - possible
    assert all(not allowed(row) and pair in set(pairs_of(row)) for pair, row in covering.impossible.items())


def test_the_rows_are_few() -> None:
    """Seven factors of seven values have 823543 combinations and at least 49 rows."""
    factors = dict.fromkeys("abcdefg", "1234567")
    assert len(cover(factors).rows) <= 90
    assert len(cover({"only": ("one", "two")}).rows) == 2
