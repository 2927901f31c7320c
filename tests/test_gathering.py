"""The one pass over a family: what it finds, what it reads of whom, and what it never reads again."""

import itertools
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_model
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergefs.catalog import Catalog
from mergefs.catalog.schema import TABLES
from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.errors import NonFiniteError
from mergefs.kernels.deltas import MAGNITUDE_BINS, ReferenceMeter
from mergefs.kernels.precision import load, store
from mergefs.methods.contract import MagnitudeThreshold
from mergefs.progress import Silence
from mergefs.sources import blocks
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.blocks import BlockDeltas, known_deltas, known_norms, pack, unpack
from mergefs.statistics.contents import identify
from mergefs.statistics.gathering import TensorGathering, TensorHashing, analyze_tensor, hash_tensor
from mergefs.statistics.histograms import known_histogram
from mergefs.statistics.histograms import pack as pack_histogram
from mergefs.statistics.histograms import unpack as unpack_histogram
from mergefs.statistics.identity import checkpoint_identity, local_key
from mergefs.statistics.service import StatisticsService

NAME = "w.weight"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
COMPUTE = {"bf16": BF16, "f16": F16, "f32": F32, "f64": F64}
ROWS, COLUMNS = 20, 16  # five blocks of four rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of a few rows, so that small ones have many."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)


@dataclass
class Shelf:
    """Models of one tensor each, a catalog, and a reader that counts."""

    directory: Path
    catalog: Catalog
    ledger: Ledger
    reader: SourceReader

    def put(self, name: str, tensor: torch.Tensor) -> Place:
        """Write a model and return where its tensor lies."""
        model = write_model(self.directory / name, {NAME: tensor}, {}, tokenizer_files=False)
        return StoredTensor.of(open_checkpoint(model), NAME)

    def copied(self, name: str) -> Place:
        """Copy a model and return where its tensor lies."""
        copy = self.directory / f"copy of {name}"
        shutil.copytree(self.directory / name, copy)
        return StoredTensor.of(open_checkpoint(copy), NAME)

    def analyze(self, base: Place, *experts: Place, compute: DType = F32) -> int:
        """Analyse, and return how many bytes that read."""
        before = self.ledger.totals().analysis_bytes_read
        analyze_tensor(base, experts, compute, self.catalog, self.reader)
        self.catalog.flush()
        return self.ledger.totals().analysis_bytes_read - before

    def deltas(self, expert: Place, base: Place, compute: DType = F32) -> BlockDeltas:
        found = known_deltas(expert, base, compute, self.catalog)
        assert found is not None
        return found

    def histogram(self, expert: Place, base: Place, compute: DType = F32) -> NDArray[np.int64]:
        found = known_histogram(expert, base, compute, self.catalog)
        assert found is not None
        return found


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    ledger = Ledger()
    reader = SourceReader(ledger)
    with Catalog(tmp_path / "catalog") as catalog:
        yield Shelf(tmp_path, catalog, ledger, reader)
    reader.close()


def base_tensor() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def changed_in(base: torch.Tensor, *which: int, by: float = 0.25) -> torch.Tensor:
    """Return a copy of ``base`` that differs in these blocks of four rows."""
    expert = base.clone()
    for block in which:
        expert[4 * block : 4 * block + 4] += by
    return expert


def assert_same_deltas(found: BlockDeltas, expected: BlockDeltas) -> None:
    for name in BlockDeltas.__slots__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


BLOCK_BYTES = 4 * COLUMNS * 4
TENSOR_BYTES = ROWS * COLUMNS * 4

# What is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(("first", "second"), tuple(itertools.product(DTYPES, DTYPES)))
def test_statistics_are_those_of_the_values_in_the_compute_dtype(
    shelf: Shelf, first: str, second: str, compute: str
) -> None:
    dtype = COMPUTE[compute]
    tensors = [changed_in(base_tensor(), 1, 4).to(DTYPES[first]), base_tensor().to(DTYPES[second])]
    expert, base = shelf.put("expert", tensors[0]), shelf.put("base", tensors[1])
    shelf.analyze(base, expert, compute=dtype)
    carrier, out = (torch.float64, F64) if dtype == F64 else (torch.float32, F32)
    # By float32 where it comes from float64, as the engine does.
    values = [tensor.float().to(DTYPES[compute]).to(carrier).flatten() for tensor in tensors]
    if dtype == F64:
        values = [tensor.double().flatten() for tensor in tensors]
    raws = [store(load(value.numpy().view(np.uint8), out, dtype), dtype, dtype) for value in values]
    meter = ReferenceMeter(dtype)
    size = 64 * dtype.itemsize
    expected = BlockDeltas.of(
        [
            meter.measure(*(raw[at * size : (at + 1) * size] for raw in raws), start)
            for at, (start, _) in enumerate(BlockGrid.of((ROWS, COLUMNS)))
        ]
    )
    found = shelf.deltas(expert, base, dtype)
    present = expected.changed > 0
    assert present.any()
    for name in BlockDeltas.__slots__:
        np.testing.assert_array_equal(getattr(found, name)[present], getattr(expected, name)[present], err_msg=name)
        assert not getattr(found, name)[~present].any()
    np.testing.assert_array_equal(shelf.histogram(expert, base, dtype), meter.histogram())
    norms = known_norms(base, dtype, shelf.catalog)
    assert norms is not None
    assert norms == pytest.approx([float((b.double() ** 2).sum()) for b in torch.split(values[1], 64)], rel=1e-6)


def test_a_value_that_overflows_the_compute_dtype_is_no_damage(shelf: Shelf) -> None:
    expert = base_tensor()
    expert[9, 3] = 1e6
    places = shelf.put("expert", expert), shelf.put("base", base_tensor())
    shelf.analyze(places[1], places[0], compute=F16)
    deltas = shelf.deltas(*places, F16)
    assert deltas.largest.tolist() == [0.0, 0.0, np.finfo(np.float32).max, 0.0, 0.0]
    assert not deltas.sketches.any()
    assert shelf.histogram(*places, F16)[0x7C00] == 1


def test_equal_bytes_of_another_dtype_are_another_tensor(shelf: Shelf) -> None:
    ones = torch.full((ROWS, COLUMNS), 1.0, dtype=torch.bfloat16)
    base = shelf.put("base", ones)
    same_bytes = shelf.put("expert", ones.view(torch.float16))
    shelf.analyze(base, same_bytes)
    assert (shelf.deltas(same_bytes, base).changed == 64).all()
    assert shelf.histogram(same_bytes, base)[0] == 0


def test_a_base_that_was_hashed_without_a_look_at_its_values_is_looked_at(shelf: Shelf) -> None:
    tensor = base_tensor()
    tensor[6, 1] = torch.nan
    model = write_model(shelf.directory / "damaged", {NAME: tensor}, {}, tokenizer_files=False)
    identify([open_checkpoint(model)], shelf.catalog, shelf.reader, Silence())
    base, expert = StoredTensor.of(open_checkpoint(model), NAME), shelf.put("expert", tensor)
    with pytest.raises(NonFiniteError, match=r"damaged.*holds nan at element 97"):
        shelf.analyze(base, expert)


def test_a_model_is_known_by_the_same_content_whoever_hashed_it(shelf: Shelf) -> None:
    model = write_model(shelf.directory / "model", {NAME: base_tensor()}, {}, tokenizer_files=False)
    opened = open_checkpoint(model)
    identify([opened], shelf.catalog, shelf.reader, Silence())
    with Catalog(shelf.directory / "another catalog") as catalog:
        hash_tensor(StoredTensor.of(opened, NAME), catalog, shelf.reader)
        catalog.flush()
        assert checkpoint_identity(opened, shelf.catalog) == checkpoint_identity(opened, catalog)


# What is read ---------------------------------------------------------------------------------------------------------


def test_adding_an_expert_reads_it_alone_and_of_the_base_the_blocks_that_differ(shelf: Shelf) -> None:
    base = shelf.put("base", base_tensor())
    first = shelf.put("first", changed_in(base_tensor(), 0, 1, 2, 3, 4))
    assert shelf.analyze(base, first) == 2 * TENSOR_BYTES
    second = shelf.put("second", changed_in(base_tensor(), 2, 3, by=0.5))
    assert shelf.analyze(base, second) == TENSOR_BYTES + 2 * BLOCK_BYTES
    assert shelf.deltas(second, base).changed.tolist() == [0, 0, 64, 64, 0]
    counts = shelf.histogram(second, base)
    assert (counts[0], counts.sum()) == (3 * 64, ROWS * COLUMNS)


def test_a_tensor_that_is_the_bases_is_hashed_and_takes_next_to_nothing(shelf: Shelf) -> None:
    base, expert = shelf.put("base", base_tensor()), shelf.put("expert", base_tensor())
    shelf.analyze(base)
    assert shelf.analyze(base, expert) == TENSOR_BYTES
    assert shelf.catalog.counts()["deltas"] == shelf.catalog.counts()["histograms"] == 0
    assert_same_deltas(shelf.deltas(expert, base), BlockDeltas.unchanged(5))
    assert shelf.histogram(expert, base)[0] == ROWS * COLUMNS


def test_a_copy_is_read_once_for_its_hash_and_its_statistics_are_found(shelf: Shelf) -> None:
    base, expert = shelf.put("base", base_tensor()), shelf.put("expert", changed_in(base_tensor(), 1, 2, 4))
    shelf.analyze(base, expert)
    copy = shelf.copied("expert")
    assert shelf.analyze(base, copy) == TENSOR_BYTES
    assert_same_deltas(shelf.deltas(copy, base), shelf.deltas(expert, base))
    np.testing.assert_array_equal(shelf.histogram(copy, base), shelf.histogram(expert, base))
    assert shelf.catalog.counts()["deltas"] == 1


def test_a_copy_of_the_base_is_read_once_and_all_its_deltas_are_found(shelf: Shelf) -> None:
    base, expert = shelf.put("base", base_tensor()), shelf.put("expert", changed_in(base_tensor(), 1))
    shelf.analyze(base, expert)
    copy = shelf.copied("base")
    assert known_deltas(expert, copy, F32, shelf.catalog) is None
    hash_tensor(copy, shelf.catalog, shelf.reader)
    shelf.catalog.flush()
    assert_same_deltas(shelf.deltas(expert, copy), shelf.deltas(expert, base))
    assert known_norms(copy, F32, shelf.catalog) is not None


@pytest.mark.parametrize("held", ["all", "the base", "the expert", "none"])
def test_blocks_that_are_in_memory_are_not_read_again(shelf: Shelf, held: str) -> None:
    base, expert = shelf.put("base", base_tensor()), shelf.put("expert", changed_in(base_tensor(), 1, 3))
    gathering = TensorGathering(base, (expert,), F32, shelf.catalog, shelf.reader)
    raws = [tensor.numpy().view(np.uint8).ravel() for tensor in (base_tensor(), changed_in(base_tensor(), 1, 3))]
    for raw in raws:
        raw.flags.writeable = False
    for block in range(gathering.grid.count):
        ours, theirs = (raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] for raw in raws)
        gathering.take(
            block, ours if held in ("all", "the base") else None, (theirs if held in ("all", "the expert") else None,)
        )
    gathering.keep()
    shelf.catalog.flush()
    expected = {"all": 0, "the base": TENSOR_BYTES, "the expert": TENSOR_BYTES, "none": 2 * TENSOR_BYTES}
    assert shelf.ledger.totals().analysis_bytes_read == expected[held]
    with Catalog(shelf.directory / "another catalog") as catalog:
        analyze_tensor(base, (expert,), F32, catalog, shelf.reader)
        catalog.flush()
        for place in (base, expert):
            assert shelf.catalog.content(local_key(place)) == catalog.content(local_key(place))
        read = known_deltas(expert, base, F32, catalog)
        assert read is not None
        assert_same_deltas(shelf.deltas(expert, base), read)
        np.testing.assert_array_equal(shelf.histogram(expert, base), known_histogram(expert, base, F32, catalog))
        np.testing.assert_array_equal(known_norms(base, F32, shelf.catalog), known_norms(base, F32, catalog))


def test_hashes_of_blocks_in_memory_are_those_of_the_file(shelf: Shelf) -> None:
    place, tensor = shelf.put("model", base_tensor()), base_tensor().numpy().view(np.uint8).ravel()
    hashing = TensorHashing(place, shelf.catalog)
    for start, stop in BlockGrid.of(place.shape):
        hashing.take(start, tensor[4 * start : 4 * stop])
    hashing.keep()
    shelf.catalog.flush()
    kept = shelf.catalog.content(local_key(place))
    with Catalog(shelf.directory / "another catalog") as catalog:
        hash_tensor(place, catalog, shelf.reader)
        catalog.flush()
        assert kept == catalog.content(local_key(place))


@pytest.mark.parametrize("parting", [2, 3, 4])
def test_a_tensor_that_only_begins_like_another_is_measured_all_the_same(shelf: Shelf, parting: int) -> None:
    base = shelf.put("base", base_tensor())
    shelf.analyze(base, shelf.put("first", changed_in(base_tensor(), 1, 2, 3, 4)))
    tensor = changed_in(base_tensor(), 1, 2, 3, 4)
    tensor[4 * parting] += 1
    second = shelf.put("second", tensor)
    read = shelf.analyze(base, second)
    # Once the whole tensor, the blocks that agreed once more, and the base's blocks that differ.
    assert read == TENSOR_BYTES + (parting - 1) * BLOCK_BYTES + 4 * BLOCK_BYTES
    with Catalog(shelf.directory / "another catalog") as catalog:
        analyze_tensor(base, (second,), F32, catalog, shelf.reader)
        catalog.flush()
        alone = known_deltas(second, base, F32, catalog)
        histogram = known_histogram(second, base, F32, catalog)
    assert alone is not None
    assert_same_deltas(shelf.deltas(second, base), alone)
    np.testing.assert_array_equal(shelf.histogram(second, base), histogram)


def test_another_compute_dtype_reads_what_differs_alone(shelf: Shelf) -> None:
    base, expert = shelf.put("base", base_tensor()), shelf.put("expert", changed_in(base_tensor(), 1))
    shelf.analyze(base, expert)
    assert shelf.analyze(base, expert, compute=BF16) == TENSOR_BYTES + BLOCK_BYTES  # the base for its norms
    assert shelf.deltas(expert, base, BF16).changed.tolist() == [0, 64, 0, 0, 0]


def test_a_threshold_is_found_in_the_histogram_of_the_pass(shelf: Shelf) -> None:
    """Magnitudes of BF16 lie in bins of their own: nothing is read again unless equal ones are to be told apart."""
    magnitudes = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 2.0**-10
    base, expert = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16), magnitudes.to(torch.bfloat16)
    places = shelf.put("expert", expert), shelf.put("base", base)
    shelf.analyze(places[1], places[0], compute=BF16)
    service = StatisticsService(shelf.catalog, shelf.reader)
    keep = int((expert >= expert[10, 0]).sum())
    before = shelf.ledger.totals().analysis_bytes_read
    limit = service.answers((MagnitudeThreshold(0, keep),), places, 1, BF16).threshold(0, keep)
    assert shelf.ledger.totals().analysis_bytes_read == before
    assert limit.key == int(expert[10, 0].view(torch.int16))


# What is kept ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), count=st.integers(0, 40))
def test_block_statistics_come_back_as_they_were_packed(data: st.DataObject, count: int) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    present = generator.random(count) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    floats = [np.where(present, generator.standard_normal(count), 0).astype(np.float32) for _ in range(4)]
    changed = np.where(present, generator.integers(1, 2**32, count), 0).astype(np.uint32)
    sketches = np.where(present[:, None], generator.integers(-127, 128, (count, 128)), 0).astype(np.int8)
    deltas = BlockDeltas(floats[0], floats[1], floats[2], changed, sketches, floats[3])
    record = pack(deltas)
    assert_same_deltas(unpack(record), deltas)
    assert len(record.sketches) == 128 * int(present.sum())


@given(seed=st.integers(0, 2**32), filled=st.integers(0, 3000), largest=st.integers(1, 60))
def test_a_histogram_comes_back_as_it_was_packed(seed: int, filled: int, largest: int) -> None:
    generator = np.random.default_rng(seed)
    counts = np.zeros(MAGNITUDE_BINS, dtype=np.int64)
    bins = generator.choice(MAGNITUDE_BINS, filled, replace=False)
    counts[bins] = 2 ** generator.uniform(0, largest, filled)
    record = pack_histogram(counts)
    np.testing.assert_array_equal(unpack_histogram(record), counts)
    assert len(zlib.decompress(record.packed)) <= 3 + filled * (3 + 9)


def test_statistics_take_less_than_a_thousandth_of_an_expert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With blocks of their true size; larger tensors have a histogram for more bytes, and so a smaller share."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 512 * 1024)
    generator = torch.Generator().manual_seed(2)
    base = (0.02 * torch.randn(5632, 1024, generator=generator)).to(torch.bfloat16)
    noise = torch.randn(base.shape, generator=generator)
    expert = (base.float() + 3e-4 * noise * noise.abs()).to(torch.bfloat16)
    half = torch.cat([base[:2816], expert[2816:]])
    sizes = []
    for name, tensor in (("whole", expert), ("half", half)):
        ledger = Ledger()
        with Catalog(tmp_path / name / "catalog") as catalog:
            shelf = Shelf(tmp_path / name, catalog, ledger, SourceReader(ledger))
            places = shelf.put("base", base), shelf.put("expert", tensor)
            shelf.analyze(places[0], compute=BF16)
            before = record_bytes(catalog.path)
            shelf.analyze(*places, compute=BF16)
            sizes.append(record_bytes(catalog.path) - before)
            shelf.reader.close()
    assert sizes[0] < expert.nbytes // 1000
    assert sizes[1] <= sizes[0] - 5 * 148  # of the eleven blocks five have no statistics and one is half as full


def record_bytes(catalog: Path) -> int:
    """Return the bytes of all keys and values of a catalog."""
    script = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1], max_dbs=30, readonly=True, lock=False) as environment:\n"
        "    total = 0\n"
        "    for name in sys.argv[2:]:\n"
        "        table = environment.open_db(name.encode(), create=False)\n"
        "        with environment.begin(db=table) as transaction:\n"
        "            total += sum(len(key) + len(value) for key, value in transaction.cursor())\n"
        "print(total)\n"
    )
    arguments = [sys.executable, "-c", script, str(catalog), *TABLES]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
