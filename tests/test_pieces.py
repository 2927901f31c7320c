"""Weight files are cut into pieces by what they hold, and each byte of them is hashed once."""

import struct
from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from mergefs.checkpoint.dtypes import BF16, DTYPES, DType
from mergefs.materialize import file_hashes
from mergefs.materialize.file_hashes import FileHashes
from mergefs.materialize.pieces import HEADER_PIECE, Pieces, hash_between
from mergefs.planner.plan import OutputFile, TensorPlan
from mergefs.sources.blocks import BlockGrid
from mergefs.statistics.identity import content_digest

MIB = 2**20
Placed = list[tuple[str, int, DType, tuple[int, ...]]]

headers = st.one_of(st.integers(8, 4096), st.sampled_from([MIB, MIB + 1, 2 * MIB + 17]))
shapes = st.one_of(
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
    st.tuples(st.integers(1, 3), st.sampled_from([1000, 512 * 1024, 700_001])),
)
dtypes = st.sampled_from([DTYPES[name] for name in ("BF16", "F32", "U8")])
files = st.tuples(headers, st.lists(st.tuples(dtypes, shapes), max_size=5))


def placed(header: int, tensors: list[tuple[DType, tuple[int, ...]]]) -> tuple[int, Placed]:
    """Return the size of a file, and where its tensors lie."""
    found: Placed = []
    end = header
    for number, (dtype, shape) in enumerate(tensors):
        found.append((f"t{number}", end, dtype, shape))
        end += BlockGrid.of_contents(shape).size * dtype.itemsize
    return end, found


@given(files)
def test_pieces_cover_the_file_and_are_the_blocks_that_each_tensor_is_known_by(
    file: tuple[int, list[tuple[DType, tuple[int, ...]]]],
) -> None:
    size, tensors = placed(*file)
    pieces = Pieces.of(size, tensors)
    assert (pieces.bounds[0], pieces.bounds[-1], pieces.count) == (0, size, len(pieces.bounds) - 1)
    assert all(begin < end for begin, end in pairwise(pieces.bounds))
    header = [end for end in pieces.bounds if 0 < end <= file[0]]
    assert header == [*range(HEADER_PIECE, file[0], HEADER_PIECE), file[0]]
    for name, offset, dtype, shape in tensors:
        numbers = pieces.tensors[name]
        blocks = [offset + start * dtype.itemsize for start, _ in BlockGrid.of_contents(shape)]
        assert [pieces.bounds[number] for number in numbers] == blocks
        assert all(pieces.tensor_of(number) == name for number in numbers)
    assert pieces.tensor_of(0) is None


@given(files, st.data())
def test_pieces_of_a_range_are_found(
    file: tuple[int, list[tuple[DType, tuple[int, ...]]]], data: st.DataObject
) -> None:
    size, tensors = placed(*file)
    pieces = Pieces.of(size, tensors)
    near = [bound + by for bound in pieces.bounds for by in (-1, 0, 1) if 0 <= bound + by <= size]
    begin = data.draw(st.one_of(st.integers(0, size - 1), st.sampled_from([one for one in near if one < size])))
    end = data.draw(st.one_of(st.integers(begin + 1, size), st.sampled_from([one for one in near if one > begin])))
    every = list(enumerate(pairwise(pieces.bounds)))
    assert list(pieces.within(begin, end)) == [number for number, (a, b) in every if begin <= a and b <= end]
    cuts = pieces.cuts(begin, end)
    assert cuts == tuple(sorted({begin, end, *(bound for bound in pieces.bounds if begin < bound < end)}))
    assert begin in range(*pieces.bounds[pieces.at(begin) : pieces.at(begin) + 2])


@given(files, st.integers(0, 9 * MIB))
def test_runs_have_all_pieces_in_order_and_as_many_as_fit(
    file: tuple[int, list[tuple[DType, tuple[int, ...]]]], size: int
) -> None:
    pieces = Pieces.of(*placed(*file))
    runs = list(pieces.runs(size))
    assert [number for run in runs for number in run] == list(range(pieces.count))
    for run, following in pairwise(runs):
        assert len(run) == 1 or pieces.bounds[run.stop] - pieces.bounds[run.start] <= size
        assert pieces.bounds[following.start + 1] - pieces.bounds[run.start] > size


def planned(size: int, tensors: Placed) -> tuple[OutputFile, dict[str, TensorPlan]]:
    """Return a file and its tensors as a plan has them."""
    names = tuple(name for name, *_ in tensors)
    output = OutputFile("model.safetensors", b"", names, tuple(offset for _, offset, *_ in tensors), size)
    plans = {name: TensorPlan(name, shape, dtype, dtype, (), (), None, None, None) for name, _, dtype, shape in tensors}
    return output, plans


@given(files, st.integers(1, 9 * MIB), st.integers(0, 255))
@example((8, [(BF16, (3, 512 * 1024))]), 4096, 1)
def test_each_piece_and_each_tensor_is_known_by_its_own_bytes_however_the_file_comes(
    file: tuple[int, list[tuple[DType, tuple[int, ...]]]], step: int, seed: int
) -> None:
    size, tensors = placed(*file)
    step = max(step, size // 200)
    content = memoryview((struct.pack("<IB", size, seed) * (size // 5 + 1))[:size])
    pieces = Pieces.of(size, tensors)
    hashes = FileHashes(*planned(size, tensors), pieces)
    ended: list[str] = []
    for begin in range(0, size, step):
        view = content[begin : begin + step]
        hashes.update(begin, view, hash_between(pieces.cuts(begin, begin + len(view)), view))
        ended += hashes.ended()
        for name, offset, dtype, shape in tensors:
            end = offset + BlockGrid.of_contents(shape).size * dtype.itemsize
            assert name not in ended or end <= begin + len(view)
    assert ended == [name for name, *_ in tensors]
    expected = [blake3(content[begin:end]).hexdigest() for begin, end in pairwise(pieces.bounds)]
    assert hashes.file_entry().pieces == tuple(expected)
    for name, _, dtype, shape in tensors:
        digests = [bytes.fromhex(expected[number]) for number in pieces.tensors[name]]
        assert hashes.contents()[name] == content_digest(dtype, shape, digests)


def test_only_what_lies_in_two_runs_is_hashed_by_who_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    size, tensors = placed(100, [(BF16, (16, 512 * 1024))])
    content = memoryview(bytes(size))
    pieces = Pieces.of(size, tensors)
    hashes = FileHashes(*planned(size, tensors), pieces)
    hashed = 0

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.update(data)

        def update(self, data: bytes) -> None:
            nonlocal hashed
            hashed += len(data)

        def hexdigest(self) -> str:
            return "0" * 64

    monkeypatch.setattr(file_hashes, "blake3", Counting)
    for begin in range(0, size, 8 * MIB):
        view = content[begin : begin + 8 * MIB]
        hashes.update(begin, view, ["0" * 64] * (len(pieces.cuts(begin, begin + len(view))) - 1))
    assert hashed == 2 * MIB
