"""Blocks that were read to learn something of a whole tensor, held for the merge that needs the same bytes next."""

import threading
from dataclasses import dataclass, field
from typing import TypeAlias

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import FileKey, Shard
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid

_Tensor: TypeAlias = tuple[FileKey, int]


@dataclass(slots=True)
class _Held:
    """The blocks of one tensor by their first element, which of them were used, and how many users are done with it."""

    blocks: dict[int, Raw] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    done: int = 0


class HeldBlocks:
    """Holds blocks of tensors, at most ``capacity`` bytes of them; what does not fit is not held.

    Nothing is dropped for others, so of a tensor that is too large the part that fits need not be read again. Safe to
    share between threads.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._tensors: dict[_Tensor, _Held] = {}
        self._size = 0

    def get(self, shard: Shard, tensor: TensorSource, start: int, stop: int) -> Raw | None:
        """Return the block with these elements, None where it is not held."""
        with self._lock:
            held = self._tensors.get(_key(shard, tensor))
            found = None if held is None else held.blocks.get(start)
        return None if found is None or found.nbytes != (stop - start) * tensor.dtype.itemsize else found

    def use(self, shard: Shard, tensor: TensorSource, start: int) -> bool:
        """Note that a block that is held is used for the merge, and return whether that is the first time."""
        with self._lock:
            held = self._tensors.get(_key(shard, tensor))
            if held is None or start in held.used:
                return False
            held.used.add(start)
            return True

    def hold(self, shard: Shard, tensor: TensorSource, start: int, raw: Raw) -> None:
        """Hold ``raw``, which must not be written to any more, if it is a block and there is room for it."""
        grid = BlockGrid.of(tensor.shape)
        elements = raw.nbytes // tensor.dtype.itemsize
        if start % grid.step or not elements or elements != min(grid.step, grid.size - start):
            return
        with self._lock:
            if self._size + raw.nbytes <= self._capacity:
                held = self._tensors.setdefault(_key(shard, tensor), _Held())
                if start not in held.blocks:
                    held.blocks[start] = raw
                    self._size += raw.nbytes

    def has(self, shard: Shard, tensor: TensorSource) -> bool:
        """Return whether anything of a tensor is held."""
        with self._lock:
            return _key(shard, tensor) in self._tensors

    def forget(self, shard: Shard, tensor: TensorSource, users: int) -> None:
        """Hold nothing of a tensor any longer, once that was said by all of its users."""
        key = _key(shard, tensor)
        with self._lock:
            held = self._tensors.get(key)
            if held is not None:
                held.done += 1
                if held.done >= users:
                    del self._tensors[key]
                    self._size -= sum(block.nbytes for block in held.blocks.values())


def _key(shard: Shard, tensor: TensorSource) -> _Tensor:
    return shard.key, tensor.offset
