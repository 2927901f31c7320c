"""What is asked about quantities of whole tensors, gathered block by block, against the whole at once."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_model
from hypothesis import example, given
from hypothesis import strategies as st

from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.kernels.precision import Array, Precision, load
from mergefs.kernels.sums import PartialSums, row_sums
from mergefs.methods.contract import (
    Answer,
    Answers,
    Block,
    ColumnSums,
    ElementQuantile,
    ElementSum,
    ElementSums,
    ElementThreshold,
    RowValues,
    SingleSums,
    Threshold,
)
from mergefs.sources import blocks
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.order import largest, ranked_keys
from mergefs.statistics.quantities import AboutQuantity, answer_quantities
from mergefs.statistics.service import StatisticsService
from mergefs.statistics.stream import TensorStream

COMPUTE = {"bf16": BF16, "fp16": F16, "fp32": F32, "fp64": F64}
EVERY_COMPUTE = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)
SHAPES = ((), (0,), (7,), (1, 5), (5, 1), (13, 9), (4, 3, 5), (2, 3, 4, 5), (3, 200))
NAME = "w.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of a few rows, so that small ones have many."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16)


def random_tensor(shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Return a tensor in which many values are equal, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, tuple(shape), generator=generator) * torch.tensor(-0.25)


def stream_of(directory: Path, compute: DType, *tensors: torch.Tensor) -> TensorStream:
    """Write a model for each tensor and return their stream."""
    models = [write_model(directory / str(number), {NAME: tensor}, {}) for number, tensor in enumerate(tensors)]
    places = [StoredTensor.of(open_checkpoint(model), NAME) for model in models]
    return TensorStream(places, compute, SourceReader(Ledger()))


def ask(
    directory: Path, compute: DType, tensors: Sequence[torch.Tensor], wanted: Sequence[AboutQuantity]
) -> list[Answer]:
    stream = stream_of(directory, compute, *tensors)
    answers = answer_quantities(wanted, stream)
    stream.reader.close()
    return [answers[one] for one in wanted]


def first_input(block: Block, precision: Precision) -> Array:
    return block.inputs[0]


def difference(block: Block, precision: Precision) -> Array:
    return precision.round(block.inputs[0] - block.inputs[1])


# Sums, rows, columns


@EVERY_COMPUTE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_rows_and_columns_are_those_of_the_whole_tensor(
    tmp_path: Path, compute: DType, shape: tuple[int, ...]
) -> None:
    tensors = [random_tensor(shape, seed) for seed in (1, 2)]
    row, columns = max(1, shape[-1] if shape else 1), max(1, math.prod(shape[1:]))

    def both(block: Block, precision: Precision) -> Array:
        return np.stack([*block.inputs, difference(block, precision)])

    def of_rows(block: Block, precision: Precision) -> Array:
        highest: Array = block.inputs[0].reshape(-1, row).max(axis=1)
        return highest

    total, totals, singles, highest, by_column = ask(
        tmp_path,
        compute,
        tensors,
        [
            ElementSum("difference", (0, 1), difference),
            ElementSums("both", (0, 1), both, count=3),
            SingleSums("both", (0, 1), both, count=3),
            RowValues("highest", (1,), of_rows, row=row),
            ColumnSums("columns", (0,), first_input, columns=columns),
        ],
    )
    a, b = (tensor.double().numpy() for tensor in tensors)
    assert total == (a - b).sum()
    assert np.array_equal(totals, [a.sum(), b.sum(), (a - b).sum()])
    assert np.array_equal(singles, totals)
    assert np.array_equal(highest, b.reshape(-1, row).max(axis=1))
    assert np.array_equal(by_column, a.reshape(-1, columns).sum(axis=0))


def test_sums_of_infinities_and_nan_are_those_of_floating_point(tmp_path: Path) -> None:
    tensor = torch.ones(40, 3)
    tensor[3, 0], tensor[30, 0], tensor[5, 1], tensor[7, 2] = math.inf, -math.inf, math.inf, math.nan
    wanted = [
        ColumnSums("columns", (0,), first_input, columns=3),
        ElementSum("sum", (0,), first_input),
        ElementSums("sums", (0,), lambda block, _: np.stack(block.inputs), count=1),
    ]
    columns, total, totals = ask(tmp_path, F32, [tensor], wanted)
    assert isinstance(columns, np.ndarray)
    assert math.isnan(columns[0])
    assert columns[1] == math.inf
    assert math.isnan(columns[2])
    assert isinstance(total, float)
    assert math.isnan(total)
    assert isinstance(totals, np.ndarray)
    assert math.isnan(totals[0])


def test_sums_are_correctly_rounded_over_blocks(tmp_path: Path) -> None:
    """Whatever cancels between blocks leaves no error behind."""
    tensor = torch.tensor([1e30, 1.0, -1e30, 2.0**-40]).repeat_interleave(16).reshape(4, 16)
    (total,) = ask(tmp_path, F32, [tensor], [ElementSum("sum", (0,), first_input)])
    exact = sum(Fraction(float(value)) for value in tensor.flatten())
    assert total == float(exact)


@pytest.mark.parametrize("shape", [(5,), (40, 37), (33, 1), (3, 4000)], ids=str)
def test_float32_sums_do_not_depend_on_blocks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)]
    wanted = SingleSums("both", (0, 1), lambda block, _: np.stack(block.inputs), count=2)
    (found,) = ask(tmp_path, F32, tensors, [wanted])
    assert np.array_equal(found, row_sums(np.stack([tensor.flatten().numpy() for tensor in tensors])))


@given(size=st.integers(0, 3000), cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_float32_sums_do_not_depend_on_where_a_vector_is_cut(size: int, cuts: list[int]) -> None:
    values = np.random.default_rng(size).normal(0.3, 1, (2, size)).astype(np.float32)
    partial = PartialSums.begin(2, size)
    for piece in np.split(values, sorted(min(cut, size) for cut in cuts), axis=1):
        partial = partial.add(piece)
    assert np.array_equal(partial.finish(), row_sums(values))


# Order


def patterns(dtype: DType) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the bytes of every value of a 16 bit type, and of values of all sizes of a wider one."""
    if dtype.bits == 16:
        return np.arange(2**16, dtype=np.uint16).view(np.uint8)
    generator = np.random.default_rng(1)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45], dtype=f"f{dtype.itemsize}")
    return np.concatenate([generator.integers(0, 256, 8000 * dtype.itemsize, dtype=np.uint8), special.view(np.uint8)])


@EVERY_COMPUTE
def test_order_keys_order_as_the_values_do_and_nan_is_above_all(compute: DType) -> None:
    precision = Precision(compute)
    values = load(patterns(compute), compute, compute)
    with np.errstate(invalid="ignore"):
        keys = precision.order_keys(values)
    assert keys.dtype.itemsize * 8 == precision.order_bits == compute.bits
    assert len(set(keys[np.isnan(values)].tolist())) == 1
    assert keys[np.isnan(values)].min() > keys[~np.isnan(values)].max()
    order = np.argsort(keys, kind="stable")
    numbers = values[order][~np.isnan(values[order])]
    assert (numbers[1:] >= numbers[:-1]).all()
    sorted_keys = keys[order][: numbers.size]
    assert np.array_equal(sorted_keys[1:] == sorted_keys[:-1], numbers[1:] == numbers[:-1])


@EVERY_COMPUTE
def test_the_value_of_an_order_key_is_the_value_that_has_it(compute: DType) -> None:
    precision = Precision(compute)
    values = load(patterns(compute), compute, compute)[-3000:]
    with np.errstate(invalid="ignore"):
        found = [precision.of_order_key(int(key)) for key in precision.order_keys(values)]
        assert np.array_equal(np.array(found), values.astype(np.float64), equal_nan=True)


@st.composite
def key_blocks(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Draw the width of keys, and keys in blocks; few different ones, so that many are equal."""
    bits = draw(st.sampled_from([16, 32, 64]))
    alphabet = draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=6))
    return bits, draw(st.lists(st.lists(st.sampled_from(alphabet), max_size=6), min_size=1, max_size=5))


@given(made=key_blocks(), share=st.floats(0, 1))
@example(made=(32, [[0, 0, 0]]), share=0.5)
@example(made=(64, [[2**64 - 1, 0]]), share=1.0)
def test_ranks_and_thresholds_are_those_of_sorted_keys(made: tuple[int, list[list[int]]], share: float) -> None:
    bits, parts = made
    flat = [key for part in parts for key in part]
    starts = np.cumsum([0, *map(len, parts)]).tolist()

    def stream() -> list[tuple[int, np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]]]:
        return [(start, np.array(part, dtype=f"u{bits // 8}")) for start, part in zip(starts, parts, strict=False)]

    if not flat:
        return
    ranks = list(range(len(flat)))
    assert [one.key for one in ranked_keys(lambda: iter(stream()), bits, ranks)] == sorted(flat)
    keep = min(max(1, int(share * len(flat))), len(flat))
    limit = largest(lambda: iter(stream()), bits, len(flat), keep)
    kept = {index for index, key in enumerate(flat) if key > limit.key or (key == limit.key and index < limit.cut)}
    assert kept == set(sorted(range(len(flat)), key=lambda index: (-flat[index], index))[:keep])


@EVERY_COMPUTE
@pytest.mark.parametrize("shape", [(1,), (13, 9), (4, 3, 5)], ids=str)
def test_quantiles_and_thresholds_are_those_of_the_whole_tensor(
    tmp_path: Path, compute: DType, shape: tuple[int, ...]
) -> None:
    tensors = [random_tensor(shape, seed) for seed in (3, 4)]
    size = math.prod(shape)
    expected = (tensors[0].double() - tensors[1].double()).flatten().numpy()
    ranks = range(0, size, 5)
    keeps = range(1, size + 1, 7)
    quantiles = [ElementQuantile("difference", (0, 1), difference, rank=rank) for rank in ranks]
    thresholds = [ElementThreshold("difference", (0, 1), difference, keep=keep) for keep in keeps]
    answers = ask(tmp_path, compute, tensors, [*quantiles, *thresholds])
    assert answers[: len(ranks)] == np.sort(expected)[ranks].tolist()
    keys = Precision(compute).order_keys(expected.astype(Precision(compute).carrier))
    for keep, limit in zip(keeps, answers[len(ranks) :], strict=True):
        assert isinstance(limit, Threshold)
        assert set(np.flatnonzero(limit.keeps(keys, 0))) == set(np.lexsort((np.arange(size), -expected))[:keep])


def test_all_ranks_of_one_quantity_are_found_in_the_same_passes(tmp_path: Path) -> None:
    ledgers = []
    for ranks in ([5], [5, 50, 90]):
        ledger = Ledger()
        stream = stream_of(tmp_path / str(len(ranks)), F32, random_tensor((13, 9)))
        counted = TensorStream(stream.places, F32, SourceReader(ledger))
        answer_quantities([ElementQuantile("values", (0,), first_input, rank=rank) for rank in ranks], counted)
        ledgers.append(ledger.totals().analysis_bytes_read)
    assert ledgers[0] == ledgers[1] == 2 * 13 * 9 * 4


# What is known is not read again


def test_answers_are_kept_and_each_question_has_its_own(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, F32, random_tensor((12, 6), 5))
    ledger = Ledger()
    wanted = (
        ElementSum("values", (0,), first_input),
        ElementSums("values", (0,), lambda block, _: np.stack(block.inputs), count=1),
        ElementSum("values", (0,), first_input, (2.0,)),
        ElementThreshold("values", (0,), first_input, keep=10),
        ElementThreshold("values", (0,), first_input, keep=40),
        ElementQuantile("values", (0,), first_input, rank=10),
        ElementQuantile("values", (0,), first_input, rank=60),
        RowValues("values", (0,), lambda block, _: block.inputs[0].reshape(-1, 6).max(axis=1), row=6),
        RowValues("values", (0,), lambda block, _: block.inputs[0].reshape(-1, 3).max(axis=1), row=3),
        ColumnSums("values", (0,), first_input, columns=6),
        ColumnSums("values", (0,), first_input, columns=2),
        SingleSums("values", (0,), lambda block, _: np.stack(block.inputs), count=1),
    )
    with Catalog(tmp_path / "catalog") as catalog:
        service = StatisticsService(catalog, SourceReader(ledger))
        first = service.answers(wanted, tuple(stream.places), None, F32)
        read = ledger.totals().analysis_bytes_read
        again = StatisticsService(catalog, SourceReader(ledger)).answers(wanted, tuple(stream.places), None, F32)
        assert ledger.totals().analysis_bytes_read == read > 0
    assert len(first.values) == len(wanted)
    for one in wanted:
        assert type(first.values[one]) is type(again.values[one])
        assert np.array_equal(np.asarray(first.values[one], dtype=object), np.asarray(again.values[one], dtype=object))
    assert first.limit(wanted[3]) != first.limit(wanted[4])  # type: ignore[arg-type]
    assert first.vector(wanted[7]).size == 12  # type: ignore[arg-type]
    assert first.vector(wanted[8]).size == 24  # type: ignore[arg-type]
    assert first.vector(wanted[10]).size == 2  # type: ignore[arg-type]


def test_an_answer_of_another_kind_is_told() -> None:
    total, rows = ElementSum("a", (0,), first_input), RowValues("b", (0,), first_input, row=1)
    limit = ElementThreshold("c", (0,), first_input, keep=1)
    wrong = Answers({total: Threshold(1, 1), rows: 1.0, limit: 1.0})
    with pytest.raises(TypeError, match="a number was asked for"):
        wrong.number(total)
    with pytest.raises(TypeError, match="a vector was asked for"):
        wrong.vector(rows)
    with pytest.raises(TypeError, match="a threshold was asked for"):
        wrong.limit(limit)
