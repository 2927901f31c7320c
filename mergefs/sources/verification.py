"""Holds what is read from sources against the hashes that an analysis has kept of it, block by block."""

import threading
from collections.abc import Callable
from typing import Final, TypeAlias

from blake3 import blake3

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import FileKey, Shard
from mergefs.errors import SourceChangedError
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.learning import LearnedHashes

DIGEST_BYTES: Final = 32

KnownHashes: TypeAlias = Callable[[Shard, TensorSource], bytes | None]
"""Returns the hashes (32 bytes of blake3) of all blocks of a tensor, one after the other; None where nobody knows."""


class BlockCheck:
    """Checks the blocks of stored tensors. Safe to share between threads.

    Hashes are asked for once for each tensor; a tensor that has none yet is asked for again, since an analysis may be
    under way, unless what is read is ``learned``: then that is held against what is read of it again.
    """

    def __init__(self, known: KnownHashes, learned: LearnedHashes | None = None) -> None:
        self._known = known
        self._learned = learned
        self._lock = threading.Lock()
        self._hashes: dict[tuple[FileKey, str], bytes | None] = {}

    def check(self, shard: Shard, tensor: TensorSource, start: int, raw: Raw) -> None:
        """Check ``raw``, the bytes of a run of elements of ``tensor`` from flat index ``start``.

        Only blocks that lie in the run as a whole can be checked. Raises SourceChangedError naming the first block that
        is not what was analysed.
        """
        grid = BlockGrid.of(tensor.shape)
        itemsize = tensor.dtype.itemsize
        stop = start + raw.size // itemsize
        first = -(-start // grid.step)
        last = grid.count if stop == grid.size else stop // grid.step
        if first >= last:
            return
        hashes = self._hashes_of(shard, tensor, grid)
        if hashes is None and self._learned is None:
            return
        for block in range(first, last):
            begin, end = grid.bounds(block)
            found = blake3(raw[(begin - start) * itemsize : (end - start) * itemsize].data).digest()
            if hashes is not None:
                sound = found == hashes[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
            else:
                sound = self._learned is None or self._learned.add(shard, tensor, grid.count, block, found)
            if not sound:
                raise SourceChangedError(
                    f"{shard.path}: block {block} of tensor {tensor.name!r} (bytes {tensor.offset + begin * itemsize} "
                    f"to {tensor.offset + end * itemsize}) is not what was analysed, although size and times of the "
                    "file are the same; restore the file, or `touch` it where its new content is meant, and plan again"
                )

    def _hashes_of(self, shard: Shard, tensor: TensorSource, grid: BlockGrid) -> bytes | None:
        """Return the hashes of a tensor, None where there are none that fit its blocks."""
        key = (shard.key, tensor.name)
        with self._lock:
            if key in self._hashes:
                return self._hashes[key]
        hashes = self._known(shard, tensor)
        if hashes is not None and len(hashes) != grid.count * DIGEST_BYTES:
            hashes = None
        if hashes is not None or self._learned is not None:
            with self._lock:
                self._hashes[key] = hashes
        return hashes
