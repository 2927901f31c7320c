"""Statistics of whole tensors, gathered block by block, against numpy and Python over the whole at once."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from checkpoints import write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.errors import NonFiniteError
from mergefs.methods.contract import MagnitudeRescale, MagnitudeThreshold, Statistic, Threshold
from mergefs.methods.slerp import inner_product
from mergefs.sources import blocks
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.blocks import known_deltas
from mergefs.statistics.gathering import analyze_tensor
from mergefs.statistics.identity import checkpoint_identity
from mergefs.statistics.pair import TensorPair
from mergefs.statistics.quantities import answer_quantities
from mergefs.statistics.service import StatisticsService
from mergefs.statistics.stream import TensorStream
from mergefs.statistics.thresholds import (
    BINS,
    Sought,
    find_thresholds,
    magnitude_histogram,
    magnitude_histograms,
    rescale_factor,
    threshold,
)

COMPUTE = {"bf16": BF16, "fp16": F16, "fp32": F32, "fp64": F64}
NAME = "w.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of a few rows, so that small ones have many."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)


def places_of(directory: Path, *tensors: torch.Tensor) -> tuple[Place, ...]:
    """Write a model for each tensor and return where they lie."""
    models = [write_model(directory / str(number), {NAME: tensor}, {}) for number, tensor in enumerate(tensors)]
    opened = [open_checkpoint(model) for model in models]
    return tuple(StoredTensor.of(checkpoint, NAME) for checkpoint in opened)


def pair_of(directory: Path, expert: torch.Tensor, base: torch.Tensor, compute: DType) -> TensorPair:
    places = places_of(directory, expert, base)
    return TensorPair(places[0], places[1], compute, SourceReader(Ledger()))


def keys_of(expert: torch.Tensor, base: torch.Tensor, compute: DType) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the magnitudes of the delta as torch computes it, as integers in the order of the magnitudes."""
    dtype: torch.dtype = getattr(torch, compute.torch_name)
    delta = (expert.to(dtype) - base.to(dtype)).abs().flatten()
    if compute in (BF16, F16):
        return delta.view(torch.int16).numpy().astype(np.int64)
    return delta.float().view(torch.int32).numpy().astype(np.int64)


def survivors(keys: np.ndarray[tuple[int], np.dtype[np.int64]], keep: int) -> set[int]:
    """Return the indices of the ``keep`` largest; of equals, those that come first."""
    order = np.lexsort((np.arange(keys.size), -keys))
    return set(order[:keep].tolist())


def kept_by(limit: Threshold, keys: np.ndarray[tuple[int], np.dtype[np.int64]]) -> set[int]:
    places = np.arange(keys.size)
    mask = (keys > limit.key) | ((keys == limit.key) & (places < limit.cut))
    return set(np.flatnonzero(mask).tolist())


@st.composite
def tensor_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw an expert and a base of one shape; half of the time almost all magnitudes are equal to others."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 90))
    seed, levels = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 2, 3, 1000]))
    generator = np.random.default_rng(seed)
    base = generator.standard_normal((rows, columns))
    delta = generator.integers(-levels, levels + 1, (rows, columns)) * 2.0**-6
    stored = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    base_tensor = torch.from_numpy(np.round(base * 8) / 8 if levels < 1000 else base).to(stored)
    return (base_tensor.double() + torch.from_numpy(delta)).to(stored), base_tensor


# Thresholds -----------------------------------------------------------------------------------------------------------


@given(pair=tensor_pairs(), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("compute", COMPUTE)
def test_a_threshold_keeps_exactly_the_largest_and_of_equals_the_first(
    catalogs: Path, compute: str, pair: tuple[torch.Tensor, torch.Tensor], share: float
) -> None:
    directory = catalogs / uuid4().hex
    made = pair_of(directory, *pair, COMPUTE[compute])
    keys = keys_of(*pair, COMPUTE[compute])
    keep = min(max(1, int(share * keys.size)), keys.size)
    limit = threshold(made, magnitude_histogram(made), keep)
    assert kept_by(limit, keys) == survivors(keys, keep)
    made.reader.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize("compute", COMPUTE)
def test_thresholds_of_every_density_of_one_tensor(tmp_path: Path, compute: str) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(11, 17, generator=generator)
    expert = base + torch.randint(-4, 5, (11, 17), generator=generator) / 16
    made = pair_of(tmp_path, expert, base, COMPUTE[compute])
    keys = keys_of(expert, base, COMPUTE[compute])
    histogram = magnitude_histogram(made)
    for keep in range(1, keys.size + 1):
        assert kept_by(threshold(made, histogram, keep), keys) == survivors(keys, keep)
    made.reader.close()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("fused", [True, False])
def test_a_histogram_counts_every_magnitude(tmp_path: Path, compute: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    base, expert = (torch.randn(13, 29, generator=generator) for _ in range(2))
    made = pair_of(tmp_path, expert, base, COMPUTE[compute])
    shift = 0 if COMPUTE[compute].bits == 16 else 16
    expected = np.bincount(keys_of(expert, base, COMPUTE[compute]) >> shift, minlength=BINS)
    assert np.array_equal(magnitude_histogram(made, fused), expected)
    made.reader.close()


@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
@given(pair=tensor_pairs(), seed=st.integers(0, 2**31), count=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_thresholds_that_are_found_together_are_those_that_numpy_finds_of_each(
    catalogs: Path, compute: str, pair: tuple[torch.Tensor, torch.Tensor], seed: int, count: int
) -> None:
    """Numbers that are none among them: NaN, with any payload, counts as larger than all."""
    generator = np.random.default_rng(seed)
    expert, base = pair
    size = base.nbytes
    strange = torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8)).view(base.dtype).reshape(base.shape)
    experts = [expert, base.clone(), strange, expert.float()][:count]
    directory = catalogs / uuid4().hex
    places = places_of(directory, base, *experts)
    ledger = Ledger()
    reader = SourceReader(ledger)
    made = [TensorPair(place, places[0], COMPUTE[compute], reader) for place in places[1:]]
    plain = [magnitude_histogram(pair, fused=False) for pair in made]
    ledger_before = ledger.totals().analysis_bytes_read
    histograms = magnitude_histograms(made)
    assert ledger.totals().analysis_bytes_read - ledger_before == sum(tensor.nbytes for tensor in (base, *experts))
    np.testing.assert_array_equal(histograms, plain)
    keeps = [int(generator.integers(1, base.numel() + 1)) for _ in made]
    sought = [Sought(*parts) for parts in zip(made, histograms, keeps, strict=True)]
    assert find_thresholds(sought) == find_thresholds(sought, fused=False)
    reader.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_tensor_that_equals_its_base_keeps_its_first_elements(tmp_path: Path, compute: str) -> None:
    base = torch.randn(10, 10)
    made = pair_of(tmp_path, base.clone(), base, COMPUTE[compute])
    assert threshold(made, magnitude_histogram(made), 37) == Threshold(0, 37)
    assert rescale_factor(made, Threshold(0, 37)) == 1.0
    made.reader.close()


@pytest.mark.parametrize("compute", COMPUTE)
def test_the_rescaling_is_the_ratio_of_the_sums_in_the_compute_dtype(tmp_path: Path, compute: str) -> None:
    generator = torch.Generator().manual_seed(5)
    base, expert = (torch.randn(12, 31, generator=generator) for _ in range(2))
    dtype: torch.dtype = getattr(torch, COMPUTE[compute].torch_name)
    made = pair_of(tmp_path, expert, base, COMPUTE[compute])
    limit = threshold(made, magnitude_histogram(made), 100)
    magnitudes = (expert.to(dtype) - base.to(dtype)).abs().flatten().double()
    kept = magnitudes[sorted(kept_by(limit, keys_of(expert, base, COMPUTE[compute])))]
    before, after = (float(part.sum().to(dtype)) for part in (magnitudes, kept))
    assert rescale_factor(made, limit) == pytest.approx(before / after, rel=1e-12)
    made.reader.close()


# Inner products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE)
def test_an_inner_product_is_that_of_the_values_in_the_compute_dtype(tmp_path: Path, compute: str) -> None:
    generator = torch.Generator().manual_seed(6)
    first, second = (torch.randn(7, 41, generator=generator) for _ in range(2))
    places = places_of(tmp_path, first, second)
    reader = SourceReader(Ledger())
    dtype: torch.dtype = getattr(torch, COMPUTE[compute].torch_name)
    numbers = [[Fraction(v) for v in tensor.to(dtype).double().flatten().tolist()] for tensor in (first, second)]
    pairs = ((0, 0), (0, 1), (1, 0))
    answers = answer_quantities(
        [inner_product(*pair) for pair in pairs], TensorStream(places, COMPUTE[compute], reader)
    )
    sums = [answers[inner_product(*pair)] for pair in pairs]
    for (a, b), found in zip(pairs, sums, strict=True):
        exact = sum(x * y for x, y in zip(numbers[a], numbers[b], strict=True))
        scale = math.sqrt(sum(x * x for x in numbers[a]) * sum(y * y for y in numbers[b]))
        assert abs(found - float(exact)) <= 1e-14 * scale
    assert sums[1] == sums[2]
    reader.close()


# Blocks ---------------------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 40), max_size=4).map(tuple))
@settings(max_examples=60, deadline=None)
def test_a_grid_covers_a_tensor_once_in_whole_rows_or_pieces_of_one(shape: tuple[int, ...]) -> None:
    grid = BlockGrid.of(shape)
    covered = [index for start, stop in grid for index in range(start, stop)]
    assert covered == list(range(math.prod(shape)))
    assert len(list(grid)) == grid.count
    row = shape[-1] if shape else 1
    for start, stop in grid:
        assert stop - start <= max(blocks.BLOCK_ELEMENTS, 1)
        assert row > blocks.BLOCK_ELEMENTS or start % row == 0 == stop % row


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_block_statistics_are_those_of_each_block(tmp_path: Path, stored: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(20, 16, generator=generator).to(stored)
    experts = [base.clone() for _ in range(2)]
    experts[0][3:9, 2:5] += 1
    experts[1][0, 0] = -base[0, 0]
    places = places_of(tmp_path, base, *experts)
    ledger = Ledger()
    reader = SourceReader(ledger)
    with Catalog(tmp_path / "catalog") as catalog:
        assert known_deltas(places[1], places[0], F32, catalog) is None
        analyze_tensor(places[0], places[1:], F32, catalog, reader)
        catalog.flush()
        assert ledger.totals().analysis_bytes_read == 3 * base.nbytes
        for place, expert in zip(places[1:], experts, strict=True):
            deltas = known_deltas(place, places[0], F32, catalog)
            assert deltas is not None
            difference = torch.split((expert.double() - base.double()).flatten(), 64)
            assert deltas.squared_norms == pytest.approx([float((d * d).sum()) for d in difference], rel=1e-6)
            changed = torch.split((expert != base).flatten(), 64)
            assert deltas.changed.tolist() == [int(block.sum()) for block in changed]
    reader.close()


def test_minus_zero_differs_from_zero(tmp_path: Path) -> None:
    base = torch.zeros(4, 4)
    places = places_of(tmp_path, base, -base)
    reader = SourceReader(Ledger())
    with Catalog(tmp_path / "catalog") as catalog:
        analyze_tensor(places[0], places[1:], F32, catalog, reader)
        catalog.flush()
        deltas = known_deltas(places[1], places[0], F32, catalog)
    assert deltas is not None
    assert (deltas.squared_norms.tolist(), deltas.changed.tolist()) == ([0.0], [16])
    reader.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_analysis_names_the_first_element_that_is_no_number(tmp_path: Path, value: float) -> None:
    base = torch.ones(30, 10)
    expert = base.clone()
    expert.view(-1)[[137, 200]] = value
    places = places_of(tmp_path, base, expert)
    reader = SourceReader(Ledger())
    with Catalog(tmp_path / "catalog") as catalog, pytest.raises(NonFiniteError) as caught:
        analyze_tensor(places[0], places[1:], F32, catalog, reader)
    assert f"tensor '{NAME}' holds {value} at element 137" in str(caught.value)
    reader.close()


# What is known is not read again --------------------------------------------------------------------------------------

WANTED: tuple[Statistic, ...] = (
    MagnitudeThreshold(1, 50),
    MagnitudeThreshold(1, 51),
    MagnitudeRescale(1, 50),
    inner_product(0, 1),
)


def random_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(16, 16, generator=generator), torch.randn(16, 16, generator=generator)


def test_a_statistic_is_gathered_once_however_many_threads_ask(tmp_path: Path) -> None:
    places = places_of(tmp_path, *random_pair())
    alone, together = Ledger(), Ledger()
    with Catalog(tmp_path / "first") as catalog:
        expected = StatisticsService(catalog, SourceReader(alone)).answers(WANTED, places, 0, F32)
    with Catalog(tmp_path / "second") as catalog:
        service = StatisticsService(catalog, SourceReader(together))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: service.answers(WANTED, places, 0, F32), range(16)))
    assert all(answer.values == expected.values for answer in answers)
    assert together.totals().analysis_bytes_read == alone.totals().analysis_bytes_read > 0


def test_what_the_catalog_knows_of_a_model_holds_for_its_copy(tmp_path: Path) -> None:
    places = places_of(tmp_path, *random_pair())
    shutil.copytree(tmp_path / "0", tmp_path / "copies" / "0")
    shutil.copytree(tmp_path / "1", tmp_path / "copies" / "1")
    opened = [open_checkpoint(tmp_path / "copies" / name) for name in ("0", "1")]
    copies = tuple(StoredTensor.of(checkpoint, NAME) for checkpoint in opened)
    ledger = Ledger()
    reader = SourceReader(ledger)
    with Catalog(tmp_path / "catalog") as catalog:
        service = StatisticsService(catalog, reader)
        for family in (places, copies):
            analyze_tensor(family[0], family[1:], F32, catalog, reader)
        catalog.flush()
        expected = service.answers(WANTED, places, 0, F32)
        before = ledger.totals().analysis_bytes_read
        assert service.answers(WANTED, copies, 0, F32).values == expected.values
        assert ledger.totals().analysis_bytes_read == before
        models = [open_checkpoint(tmp_path / name) for name in ("0", "1")]
        identities = {checkpoint_identity(model, catalog) for model in (*models, *opened)}
        assert len(identities) == 2
        assert not any(identity.startswith("local-") for identity in identities)
    reader.close()


def test_another_compute_dtype_has_statistics_of_its_own(tmp_path: Path) -> None:
    places = places_of(tmp_path, *random_pair())
    with Catalog(tmp_path / "catalog") as catalog:
        service = StatisticsService(catalog, SourceReader(Ledger()))
        limits = {
            name: service.answers(WANTED, places, 0, compute).threshold(1, 50) for name, compute in COMPUTE.items()
        }
    assert limits["bf16"].key < 2**15 <= limits["fp32"].key
    assert limits["bf16"] != limits["fp16"]
