"""Hashes of tensors that nobody knows yet, learned from their blocks as they are read for whatever reason."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import FileKey, Shard

_Tensor: TypeAlias = tuple[FileKey, str]
KeepHashes: TypeAlias = Callable[[Shard, TensorSource, Sequence[bytes]], None]
"""Takes the hashes (32 bytes of blake3) of all blocks of a tensor."""


class LearnedHashes:
    """Collects hashes of blocks, and hands those of a tensor to ``keep`` when all are there. Safe between threads."""

    def __init__(self, keep: KeepHashes) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._partly: dict[_Tensor, dict[int, bytes]] = {}
        self._whole: dict[_Tensor, bytes] = {}

    def add(self, shard: Shard, tensor: TensorSource, blocks: int, block: int, digest: bytes) -> bool:
        """Take the hash of one of so many blocks; return whether it is the one that the block had before, if any."""
        key = (shard.key, tensor.name)
        with self._lock:
            whole = self._whole.get(key)
            if whole is not None:
                return whole[block * len(digest) : (block + 1) * len(digest)] == digest
            hashes = self._partly.setdefault(key, {})
            same = hashes.setdefault(block, digest) == digest
            if len(hashes) < blocks:
                return same
            in_order = [hashes[number] for number in range(blocks)]
            self._whole[key] = b"".join(in_order)  # for as long as the catalog does not know them
            del self._partly[key]
        self._keep(shard, tensor, in_order)
        return same
