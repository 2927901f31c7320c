"""Blocks that were read to learn something of a whole tensor, held for the merge that needs the same bytes next."""

import threading
from pathlib import Path
from typing import TypeAlias

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import Fingerprint, Shard
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid

_Tensor: TypeAlias = tuple[Path, Fingerprint, int]


class HeldBlocks:
    """Holds blocks of tensors, at most ``capacity`` bytes of them; what does not fit is not held.

    Nothing is dropped for others, so of a tensor that is too large the part that fits need not be read again. Safe to
    share between threads.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._blocks: dict[_Tensor, dict[int, Raw]] = {}
        self._size = 0

    def get(self, shard: Shard, tensor: TensorSource, start: int, stop: int, last: bool) -> Raw | None:
        """Return the block with these elements, None where it is not held.

        It stays held unless this is the ``last`` time that it is asked for.
        """
        key = _key(shard, tensor)
        with self._lock:
            blocks = self._blocks.get(key, {})
            found = blocks.get(start)
            if found is None or found.nbytes != (stop - start) * tensor.dtype.itemsize:
                return None
            if last:
                self._size -= blocks.pop(start).nbytes
        return found

    def hold(self, shard: Shard, tensor: TensorSource, start: int, raw: Raw) -> None:
        """Hold ``raw``, which must not be written to any more, if it is a block and there is room for it."""
        grid = BlockGrid.of(tensor.shape)
        elements = raw.nbytes // tensor.dtype.itemsize
        if start % grid.step or not elements or elements != min(grid.step, grid.size - start):
            return
        with self._lock:
            if self._size + raw.nbytes <= self._capacity:
                blocks = self._blocks.setdefault(_key(shard, tensor), {})
                if start not in blocks:
                    blocks[start] = raw
                    self._size += raw.nbytes

    def has(self, shard: Shard, tensor: TensorSource) -> bool:
        """Return whether anything of a tensor is held."""
        with self._lock:
            return bool(self._blocks.get(_key(shard, tensor)))

    def forget(self, shard: Shard, tensor: TensorSource) -> None:
        """Hold nothing of a tensor any longer."""
        with self._lock:
            self._size -= sum(block.nbytes for block in self._blocks.pop(_key(shard, tensor), {}).values())


def _key(shard: Shard, tensor: TensorSource) -> _Tensor:
    return shard.path, shard.fingerprint, tensor.offset
