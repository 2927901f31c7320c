"""Pieces of files: their hashes, and work that goes over a file in order with a few chunks computed ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Final, TypeVar

from blake3 import blake3

from mergefs.engine.ahead import in_order
from mergefs.materialize.manifest import PIECE

_AHEAD: Final = 4
"""Chunks that are computed while earlier ones are taken."""

_Result = TypeVar("_Result")


def hash_pieces(data: bytes | memoryview) -> tuple[str, ...]:
    """Return the hash in hex of each piece of ``data``, which begins where a piece begins."""
    view = memoryview(data)
    return tuple(blake3(view[begin : begin + PIECE]).hexdigest() for begin in range(0, len(view), PIECE))


def ahead(pool: Executor, obtain: Callable[[int], _Result], offsets: Sequence[int]) -> Iterator[_Result]:
    """Yield ``obtain(offset)`` for every offset in order, a few of them computed ahead of who takes them."""
    return in_order(pool, obtain, offsets, _AHEAD)
