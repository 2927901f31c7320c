"""Sequential readers are recognised by their requests, and told apart; what is asked for ahead of them is bounded."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from queued_reading import Queued

from mergefs.errors import SourceReadError
from mergefs.mount.reading_ahead import (
    LARGEST_WINDOW,
    RECOGNISED_AFTER,
    REQUESTS,
    RUNS,
    SHARE_OF_CACHE,
    Run,
    SequentialReads,
    WatchedFile,
)
from mergefs.sources.cache import BlockCache

KIB: Final = 2**10
MIB: Final = 2**20
WEIGHTS: Final = "model.safetensors"

request_sizes = st.sampled_from([4 * KIB, 64 * KIB, 128 * KIB, MIB])

# Who is recognised ----------------------------------------------------------------------------------------------------


def taken(requests: Sequence[tuple[int, int]]) -> list[Run | None]:
    """Return what is made of each of some requests (offset, size) for one file."""
    reads = SequentialReads()
    return [reads.take(offset, size) for offset, size in requests]


@given(request_sizes, st.integers(0, 2**40), st.integers(1, 40))
def test_who_reads_in_order_is_recognised_after_two_blocks(size: int, begin: int, more: int) -> None:
    needed = max(-(-RECOGNISED_AFTER // size), REQUESTS)
    runs = taken([(begin + number * size, size) for number in range(needed + more)])
    assert runs[: needed - 1] == [None] * (needed - 1)
    run = runs[-1]
    assert run is not None
    assert all(one is run for one in runs[needed - 1 :])
    assert (run.begin, run.end, run.amount) == (begin, begin + len(runs) * size, len(runs) * size)


@given(st.data())
def test_requests_may_overtake_one_another(data: st.DataObject) -> None:
    size = 128 * KIB
    places = list(range(64))
    for first in range(0, 64, 4):
        places[first : first + 4] = data.draw(st.permutations(places[first : first + 4]))
    runs = taken([(place * size, size) for place in places])
    assert runs[-1] is not None
    assert all(run is runs[-1] for run in runs[2 * RECOGNISED_AFTER // size :])
    assert runs[-1].end == 64 * size


@given(request_sizes, st.integers(2**30, 2**40))
def test_who_reads_backwards_is_not_recognised(size: int, end: int) -> None:
    assert not any(taken([(end - number * size, size) for number in range(1, 200)]))


@given(st.permutations(range(100)), request_sizes)
def test_who_reads_at_places_far_from_one_another_is_not_recognised(places: list[int], size: int) -> None:
    assert not any(taken([(place * 16 * MIB, size) for place in places]))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB, 128 * KIB, MIB])
def test_who_reads_at_random_is_not_recognised(size: int, seed: int) -> None:
    draw = random.Random(seed)
    assert not any(taken([(draw.randrange(2**30), size) for _ in range(20_000)]))


def test_who_leaves_out_more_than_is_read_is_not_recognised() -> None:
    assert not any(taken([(number * 3 * 64 * KIB, 64 * KIB) for number in range(1000)]))


def test_readers_of_several_places_of_one_file_are_told_apart() -> None:
    reads = SequentialReads()
    for number in range(100):
        found = {reads.take(reader * 2**30 + number * 128 * KIB, 128 * KIB) for reader in range(RUNS)}
    assert len(found) == RUNS == reads.sequential
    assert None not in found


def test_a_place_that_nobody_reads_on_from_is_forgotten() -> None:
    reads = SequentialReads()
    run = [reads.take(number * MIB, MIB) for number in range(REQUESTS)][-1]
    assert run is not None
    for number in range(1, RUNS + 1):
        reads.take(number * 2**30, 4 * KIB)
    assert run.over
    assert reads.sequential == 0


# What is asked for then -----------------------------------------------------------------------------------------------


@dataclass
class Blocks:
    """A file of so many bytes, in blocks of ``step``, that notes which of them are computed."""

    size: int
    step: int = MIB
    error: Exception | None = None
    computed: list[int] = field(default_factory=list)
    brought_in: list[int] = field(default_factory=list)
    leave: Callable[[], None] = lambda: None

    def end_of(self, position: int) -> int:
        assert 0 <= position < self.size
        return min((position // self.step + 1) * self.step, self.size)

    def reach(self, begin: int, end: int) -> int:
        return self.size

    def will_read(self, begin: int, end: int) -> None:
        assert 0 <= begin < end <= self.size
        self.brought_in.append(end - begin)
        self.leave()

    def compute(self, position: int) -> None:
        assert position % self.step == 0
        self.computed.append(position)
        if self.error is not None:
            raise self.error


def read_in_order(watched: WatchedFile, begin: int, end: int, size: int = 128 * KIB) -> None:
    for offset in range(begin, end, size):
        watched.reads(offset, min(size, end - offset))


@given(st.integers(1, 80 * MIB), request_sizes.filter(lambda size: size >= 64 * KIB), st.sampled_from([MIB, 768 * KIB]))
def test_every_block_after_the_first_two_is_asked_for_once_and_in_order(size: int, request: int, step: int) -> None:
    ahead, blocks = Queued(), Blocks(size, step)
    watched = ahead.watch(blocks)
    for offset in range(0, size, request):
        watched.reads(offset, min(request, size - offset))
        ahead.work()
    assert blocks.computed == sorted(set(blocks.computed))
    first = max(-(-RECOGNISED_AFTER // request), REQUESTS) * request
    begins = range(0, size, step)
    assert blocks.computed == [begin for begin in begins if begin >= first] or size <= first


def test_the_window_grows_while_the_reader_goes_on_and_is_bounded() -> None:
    ahead, blocks = Queued(), Blocks(256 * MIB)
    watched = ahead.watch(blocks)
    leads = []
    for offset in range(0, 128 * MIB, 128 * KIB):
        watched.reads(offset, 128 * KIB)
        ahead.work()
        if blocks.computed:
            leads.append(blocks.computed[-1] + MIB - offset - 128 * KIB)
    assert leads[0] == RECOGNISED_AFTER
    assert max(leads) == LARGEST_WINDOW
    assert max(leads[: 4 * MIB // (128 * KIB)]) <= 8 * MIB


@pytest.mark.parametrize(("cache_size", "readers"), [(64 * MIB, 1), (64 * MIB, 2), (64 * MIB, 4), (512 * MIB, 8)])
def test_all_readers_together_get_a_share_of_the_cache(cache_size: int, readers: int) -> None:
    ahead = Queued(cache_size)
    files = [Blocks(512 * MIB) for _ in range(readers)]
    watched = [ahead.watch(blocks) for blocks in files]
    for offset in range(0, 256 * MIB, 128 * KIB):
        for one in watched:
            one.reads(offset, 128 * KIB)
        ahead.work()
        if offset >= 128 * MIB:
            unread = sum(max(blocks.computed[-1] + MIB - offset - 128 * KIB, 0) for blocks in files)
            assert 0 < unread <= cache_size // SHARE_OF_CACHE


def test_blocks_that_no_share_has_room_for_are_left_to_their_reader() -> None:
    ahead, blocks = Queued(64 * MIB), Blocks(512 * MIB, step=20 * MIB)
    read_in_order(ahead.watch(blocks), 0, 512 * MIB)
    ahead.work()
    assert blocks.computed == []


def test_readers_that_are_at_the_end_or_gone_leave_their_share_to_others() -> None:
    ahead = Queued(64 * MIB)
    done, gone = ahead.watch(Blocks(8 * MIB)), ahead.watch(Blocks(64 * MIB))
    read_in_order(done, 0, 4 * MIB)
    read_in_order(gone, 0, 8 * MIB)
    assert ahead.window() == 64 * MIB // SHARE_OF_CACHE // 2
    read_in_order(done, 4 * MIB, 8 * MIB)
    gone.close()
    assert ahead.window() == 64 * MIB // SHARE_OF_CACHE


def test_nothing_more_is_begun_for_a_reader_that_is_gone() -> None:
    ahead, blocks = Queued(), Blocks(64 * MIB)
    watched = ahead.watch(blocks)
    read_in_order(watched, 0, 8 * MIB)
    assert ahead.queue
    watched.close()
    ahead.work()
    assert blocks.computed == []


def test_inputs_are_read_a_little_at_a_time_and_no_more_of_them_for_a_reader_that_is_gone() -> None:
    """The disk may be slow, and who unmounts waits for what is under way."""
    ahead, blocks = Queued(), Blocks(64 * MIB)
    watched = ahead.watch(blocks)
    read_in_order(watched, 0, 8 * MIB)
    blocks.leave = watched.close
    ahead.work()
    assert blocks.brought_in == [MIB]
    assert blocks.computed == []


def test_what_a_reader_has_got_to_by_itself_is_not_computed_for_it() -> None:
    ahead, blocks = Queued(), Blocks(64 * MIB)
    read_in_order(ahead.watch(blocks), 0, 8 * MIB)
    ahead.work()
    assert min(blocks.computed) >= 8 * MIB


@pytest.mark.parametrize("error", [SourceReadError("the disk is on fire"), MemoryError()])
def test_an_error_ends_what_is_computed_ahead_of_that_reader_and_nothing_else(error: Exception) -> None:
    ahead, blocks = Queued(), Blocks(64 * MIB, error=error)
    watched = ahead.watch(blocks)
    read_in_order(watched, 0, 16 * MIB)
    ahead.work()
    read_in_order(watched, 16 * MIB, 32 * MIB)
    ahead.work()
    assert len(blocks.computed) == 1
    assert ahead.window() == LARGEST_WINDOW


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_block_that_was_prepared_is_found_and_preparing_it_is_no_look_up() -> None:
    cache = BlockCache(1000)
    block = torch.zeros(10, dtype=torch.uint8).numpy()
    cache.prepare("key", lambda: block)
    cache.prepare("key", lambda: pytest.fail("it is kept"))
    assert (cache.totals().cache_hits, cache.totals().cache_misses) == (0, 0)
    assert cache.get("key", lambda: pytest.fail("it is kept")) is block
    assert (cache.totals().cache_hits, cache.totals().cache_misses) == (1, 0)
