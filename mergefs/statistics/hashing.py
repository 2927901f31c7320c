"""Hashes of tensors that come in order: of the blocks that they are computed by, and of what they are known by."""

from collections.abc import Sequence

from blake3 import blake3

from mergefs.catalog.records import ContentRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid
from mergefs.statistics.identity import content_digest


class TensorHasher:
    """Hashes a tensor of which one block after the other is taken, as it is computed by (``BlockGrid.of``).

    These blocks are the ones that it is known by, so that one hash of each byte serves both; where they are not, every
    byte is hashed twice.
    """

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._shape = shape
        self._blocks: list[bytes] = []
        same = BlockGrid.of(shape) == BlockGrid.of_contents(shape)
        self._content = None if same else ContentHasher(dtype, shape)

    def take(self, raw: Raw) -> bytes:
        """Take the next block as it is stored, and return its hash."""
        found = blake3(raw.data).digest()
        self._blocks.append(found)
        if self._content is not None:
            self._content.update(raw.data)
        return found

    def record(self) -> ContentRecord:
        """Return what is kept of the tensor, once all blocks were taken."""
        if self._content is not None:
            return ContentRecord(self._content.finish(), b"".join(self._blocks))
        return ContentRecord(content_digest(self._dtype, self._shape, self._blocks), b"".join(self._blocks))


class ContentHasher:
    """Finds what a tensor is known by, from its bytes as they are stored, in order and cut anywhere."""

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._shape = shape
        self._step = BlockGrid.of_contents(shape).step * dtype.itemsize
        self._left = self._step
        self._hasher = blake3()
        self._hashes: list[bytes] = []

    def update(self, part: memoryview) -> None:
        """Take the next bytes."""
        while part:
            taken = part[: self._left]
            self._hasher.update(taken)
            self._left -= len(taken)
            part = part[len(taken) :]
            if not self._left:
                self._end_block()

    def finish(self) -> bytes:
        """Return what the tensor is known by, once all of it was taken."""
        if self._left < self._step:
            self._end_block()
        return content_digest(self._dtype, self._shape, self._hashes)

    def _end_block(self) -> None:
        self._hashes.append(self._hasher.digest())
        self._hasher, self._left = blake3(), self._step


def record_of(dtype: DType, shape: tuple[int, ...], hashes: Sequence[bytes]) -> ContentRecord | None:
    """Return what is kept of a tensor, from the hashes of all blocks that it is computed by.

    None where these are not the blocks that it is known by: its bytes must be hashed for that.
    """
    if BlockGrid.of(shape) != BlockGrid.of_contents(shape):
        return None
    return ContentRecord(content_digest(dtype, shape, hashes), b"".join(hashes))
