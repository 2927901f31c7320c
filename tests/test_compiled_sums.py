"""Compiled loops add up to the same bits as the definitions in numpy, wherever what they see is cut."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from uuid import uuid4

import numpy as np
import pytest
import torch
from checkpoints import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import by_dtype, random_bytes, seeds
from numpy.typing import NDArray

from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.kernels.fused import moments as fused_moments
from mergefs.kernels.fused.arrays import load as load_compiled
from mergefs.kernels.fused.arrays import precision_of
from mergefs.kernels.fused.arrays import store as store_compiled
from mergefs.kernels.fused.lanes import add_to_lanes
from mergefs.kernels.fused.squares import add_squares
from mergefs.kernels.fused.turns import add_turns
from mergefs.kernels.norms import PartialNorm
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.kernels.sums import LANES, AddToLanes, LaneSums, PartialSums
from mergefs.methods.contract import Block, ElementSum, Moments, Quantity
from mergefs.methods.norms import ask_norms
from mergefs.methods.sums import ask_sums
from mergefs.sources import blocks
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.moments import moments_of
from mergefs.statistics.quantities import AboutQuantity, answer_quantities
from mergefs.statistics.stream import TensorStream

TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}
NAME = "w.weight"

vectors = st.integers(1, 3)
sizes = st.integers(0, 3000)
cuts = st.lists(st.integers(0, 3000), max_size=6)


def pieces(seed: int, count: int, size: int, places: list[int], kind: type = np.float32) -> list[Array]:
    """Return vectors with numbers of all sizes, cut at some places."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((count, size)) * 10.0 ** generator.uniform(-3, 3, (count, size))
    return np.split(values.astype(kind), sorted(min(place, size) for place in places), axis=1)


# Each loop on its own -------------------------------------------------------------------------------------------------


@given(seed=seeds, count=vectors, size=sizes, places=cuts, kind=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_lanes(seed: int, count: int, size: int, places: list[int], kind: type) -> None:
    plain = compiled = LaneSums.begin(count)
    for piece in pieces(seed, count, size, places, kind):
        plain, compiled = plain.add(piece), compiled.add(piece, add_to_lanes)
    np.testing.assert_array_equal(compiled.lanes, plain.lanes)
    whole = np.concatenate(pieces(seed, count, size, places, kind), axis=1).astype(np.float64)
    by_lane = np.zeros((count, LANES))
    for place in range(size):
        by_lane[:, place % LANES] += whole[:, place]
    np.testing.assert_array_equal(plain.lanes, by_lane)
    np.testing.assert_allclose(plain.finish(), whole.sum(axis=1), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("way", [None, add_to_lanes], ids=["plain", "compiled"])
def test_of_no_vectors_there_are_no_sums(way: AddToLanes | None) -> None:
    assert LaneSums.begin(0).add(np.zeros((0, 5), dtype=np.float32), way).finish().size == 0


def test_doubles_that_must_not_be_written_to_and_rows_that_are_not_in_one_piece_are_added() -> None:
    values = np.arange(600, dtype=np.float64).reshape(300, 2).T
    values.flags.writeable = False
    assert LaneSums.begin(2).add(values, add_to_lanes).finish().tolist() == values.sum(axis=1).tolist()


@given(seed=seeds, size=sizes, places=cuts, dtype=st.sampled_from([BF16, F32]))
@settings(max_examples=60, deadline=None)
def test_squares(seed: int, size: int, places: list[int], dtype: DType) -> None:
    plain = compiled = PartialNorm.begin()
    for piece in pieces(seed, 1, size, places):
        plain, compiled = plain.add(piece[0], dtype), compiled.add(piece[0], dtype, add_squares)
    np.testing.assert_array_equal(compiled.lanes, plain.lanes)
    assert compiled.finish() == plain.finish()


@given(seed=seeds, count=vectors, size=sizes | st.integers(20_000, 40_000), places=cuts)
@settings(max_examples=60, deadline=None)
def test_turns(seed: int, count: int, size: int, places: list[int]) -> None:
    plain = compiled = PartialSums.begin(count, size)
    for piece in pieces(seed, count, size, places):
        plain, compiled = plain.add(piece), compiled.add(piece, add_turns)
    np.testing.assert_array_equal(compiled.levels.totals, plain.levels.totals)
    before = plain.levels.totals.copy()
    plain.add(np.ones((count, 64), dtype=np.float32), add_turns)
    np.testing.assert_array_equal(plain.levels.totals, before)
    np.testing.assert_array_equal(compiled.finish(), plain.finish())


@by_dtype
@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=lambda dtype: dtype.name)
@given(seed=seeds, size=st.integers(0, 700))
@settings(max_examples=20, deadline=None)
def test_arrays_are_loaded_rounded_and_stored_as_by_numpy(dtype: DType, stored: DType, seed: int, size: int) -> None:
    raw = random_bytes(np.random.default_rng(seed), size, stored)
    raw.flags.writeable = False
    plain, compiled = Precision(dtype), precision_of(dtype)
    with np.errstate(all="ignore"):
        expected, found = load(raw, stored, dtype), load_compiled(raw, stored, dtype)
        np.testing.assert_array_equal(found, expected)
        for values in (expected * np.float32(1 / 3), (expected * np.float32(7)).reshape(1, -1), expected[::2]):
            np.testing.assert_array_equal(compiled.round(values), plain.round(values))
        np.testing.assert_array_equal(compiled.order_keys(expected), plain.order_keys(expected))
        for out in (BF16, F16, F32):
            numbers = [load(way(expected, dtype, out), out, out) for way in (store, store_compiled)]
            np.testing.assert_array_equal(*numbers)


# One pass over bytes --------------------------------------------------------------------------------------------------


def questions(compute: DType, count: int, based: bool, lengths: tuple[float, ...]) -> list[AboutQuantity]:
    """Return what may be asked of ``count`` inputs and, last, a base; the terms written out as formulas."""
    models = tuple(range(count + based))

    def directions(block: Block, precision: Precision) -> list[Array]:
        values = list(block.inputs[:count])
        if based:
            values = [precision.round(one - block.inputs[-1]) for one in values]
        if lengths:
            values = [
                precision.round(one / precision.carrier(length)) for one, length in zip(values, lengths, strict=True)
            ]
        return values

    def norms(block: Block, precision: Precision) -> Array:
        return np.stack(directions(block, precision))

    def product(block: Block, precision: Precision) -> Array:
        first, second = directions(block, precision)[:2]
        return first.astype(np.float64) * second

    def products(block: Block, precision: Precision) -> Array:
        return np.stack([precision.round(a * b) for a, b in combinations(directions(block, precision), 2)])

    pairs = tuple(combinations(range(count), 2))
    of = Moments(based, lengths)
    return [
        ask_norms(compute, "norms", models, norms, moments=of, count=count),
        ask_norms(compute, "widened", models, norms, moments=of, count=count, widened=True),
        ask_norms(compute, "chunks", models, norms, moments=of, count=count, widened=True, chunk=96),
        ElementSum("product", models, product, moments=replace(of, pairs=((0, 1),), exact=True)),
        ask_sums(compute, "products", models, products, moments=replace(of, pairs=pairs), count=len(pairs)),
    ]


def without_moments(question: AboutQuantity) -> AboutQuantity:
    """Return the same question, to be answered by its terms."""
    return replace(question, moments=None)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.Tensor], Place]:
    directory = tmp_path_factory.mktemp("models")

    def written(tensor: torch.Tensor) -> Place:
        return StoredTensor.of(open_checkpoint(write_model(directory / uuid4().hex, {NAME: tensor}, {})), NAME)

    return written


@by_dtype
@pytest.mark.parametrize("shape", [(9, 32), (5, 64), (1, 3), (100,), (7, 96), (2000,), (40, 33)], ids=str)
@pytest.mark.parametrize(("based", "divided"), [(False, False), (True, False), (False, True), (True, True)])
def test_moments_are_what_the_terms_add_up_to(
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[torch.Tensor], Place],
    dtype: DType,
    shape: tuple[int, ...],
    based: bool,
    divided: bool,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1100 if shape == (2000,) else 128)
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3 + based)]
    stored = [TORCH[dtype] if number != 1 else torch.float32 for number in range(len(tensors))]
    places = [write(tensor.to(kind)) for tensor, kind in zip(tensors, stored, strict=True)]
    reader = SourceReader(Ledger())
    stream = TensorStream(places, dtype, reader)
    asked = questions(dtype, 3, based, (1.5, 0.25, 3.0) if divided else ())
    found = answer_quantities(asked, stream)
    expected = answer_quantities([without_moments(one) for one in asked], stream)
    for one in asked:
        np.testing.assert_array_equal(found[one], expected[without_moments(one)], err_msg=one.name)
    reader.close()


def test_moments_are_taken_from_bytes_where_blocks_are_whole_turns(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[torch.Tensor], Place]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128)
    reader = SourceReader(Ledger())
    for shape, whole in (((9, 32), True), ((40, 33), False), ((1, 33), True)):
        stream = TensorStream([write(torch.ones(shape))] * 3, F32, reader)
        for one in questions(F32, 3, False, ()):
            assert isinstance(one, Quantity)
            assert (moments_of(one, stream) is not None) == whole
            assert moments_of(without_moments(one), stream) is None
    reader.close()


def asked_pair_by_pair(compute: DType, count: int, base: int | None) -> list[AboutQuantity]:
    """Return what may be asked of each pair of ``count`` inputs, which have the base's number among them, if any."""

    def product(block: Block, precision: Precision) -> Array:
        first, second, *rest = block.inputs
        if rest:
            first, second = precision.round(first - rest[0]), precision.round(second - rest[0])
        return precision.round(first * second)[None]

    of = Moments(based=base is not None, pairs=((0, 1),))
    last = () if base is None else (base,)
    inputs = [number for number in range(count) if number != base]
    return [ask_sums(compute, "pair", (*pair, *last), product, moments=of, count=1) for pair in combinations(inputs, 2)]


@by_dtype
@pytest.mark.parametrize("shape", [(9, 32), (1, 3), (7, 96), (2000,), (40, 33)], ids=str)
@pytest.mark.parametrize("base", [None, 0, 4])
def test_products_of_many_pairs_are_the_same_whether_they_are_asked_for_together_or_not(
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[torch.Tensor], Place],
    dtype: DType,
    shape: tuple[int, ...],
    base: int | None,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1100 if shape == (2000,) else 128)
    generator = torch.Generator().manual_seed(9)
    reader = SourceReader(Ledger())
    stream = TensorStream([write(torch.randn(shape, generator=generator)) for _ in range(5)], dtype, reader)
    asked = asked_pair_by_pair(dtype, 5, base) + questions(dtype, 3, True, (1.5, 0.25, 3.0))
    found = answer_quantities(asked, stream)
    assert set(found) == set(asked)
    for one in asked:
        for alone in (one, without_moments(one)):
            np.testing.assert_array_equal(found[one], answer_quantities([alone], stream)[alone], err_msg=str(one))
    reader.close()


def test_products_of_the_same_kind_take_one_pass_over_each_block(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[torch.Tensor], Place]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128)
    passes: list[tuple[int, int]] = []
    real = fused_moments.Moments.add_products

    def add_products(self: fused_moments.Moments, raws: list[Raw], exact: bool, lanes: NDArray[np.float64]) -> None:
        passes.append((len(raws), len(self.pairs)))
        real(self, raws, exact, lanes)

    monkeypatch.setattr(fused_moments.Moments, "add_products", add_products)
    reader = SourceReader(Ledger())
    stream = TensorStream([write(torch.ones(8, 32)) for _ in range(5)], BF16, reader)
    asked = [one for base in (None, 0, 4) for one in asked_pair_by_pair(BF16, 5, base)]
    answer_quantities(asked, stream)
    assert sorted(passes) == sorted([(5, 10), (5, 6), (5, 6)] * 2), "inputs and pairs, of each of two blocks"
    reader.close()
