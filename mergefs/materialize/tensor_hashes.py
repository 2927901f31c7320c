"""Hashes of tensors, taken while their file goes by."""

from dataclasses import dataclass, field

from blake3 import blake3

from mergefs.materialize.manifest import TensorEntry
from mergefs.planner.plan import MergePlan, OutputFile, TensorPlan
from mergefs.statistics.identity import content_digest


@dataclass(slots=True)
class TensorHashes:
    """Hashes the tensors of one weight file, which comes in order."""

    plan: MergePlan
    file: OutputFile
    _current: int = 0
    _hasher: blake3 = field(default_factory=blake3)
    _blocks: "_BlockHashes" = field(default_factory=lambda: _BlockHashes(0))
    _digests: list[str] = field(default_factory=list)
    _contents: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def update(self, offset: int, view: memoryview) -> list[str]:
        """Take the next bytes of the file, which lie at ``offset``, and return the tensors that end with them."""
        ended: list[str] = []
        while self._current < len(self.file.tensors):
            begin = self.file.offsets[self._current]
            end = begin + self._tensor(self._current).nbytes
            if begin >= offset + len(view) and end > begin:
                return ended
            part = view[max(begin - offset, 0) : max(end - offset, 0)]
            self._hasher.update(part)
            self._blocks.update(part)
            if end > offset + len(view):
                return ended
            tensor = self._tensor(self._current)
            self._digests.append(self._hasher.hexdigest())
            self._contents.append(content_digest(tensor.dtype, tensor.shape, self._blocks.finish()))
            ended.append(self.file.tensors[self._current])
            self._current += 1
            self._begin()
        return ended

    def _begin(self) -> None:
        """Begin with the next tensor, where there is one."""
        self._hasher = blake3()
        if self._current < len(self.file.tensors):
            tensor = self._tensor(self._current)
            self._blocks = _BlockHashes(tensor.grid.step * tensor.dtype.itemsize)

    def entries(self) -> dict[str, TensorEntry]:
        """Return the entry of every tensor, once the whole file has been seen."""
        found = {}
        for name, offset, digest in zip(self.file.tensors, self.file.offsets, self._digests, strict=True):
            tensor = self.plan.tensors[name]
            found[name] = TensorEntry(self.file.name, offset, tensor.nbytes, tensor.dtype.name, tensor.shape, digest)
        return found

    def contents(self) -> dict[str, bytes]:
        """Return the digest of every tensor's contents, once the whole file has been seen."""
        return dict(zip(self.file.tensors, self._contents, strict=True))

    def _tensor(self, index: int) -> TensorPlan:
        return self.plan.tensors[self.file.tensors[index]]


class _BlockHashes:
    """Hashes each block, of ``step`` bytes, of a tensor that comes in order; the last one may be shorter."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._left = step
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

    def finish(self) -> list[bytes]:
        """Return the hashes of all blocks."""
        if self._left < self._step:
            self._end_block()
        return self._hashes

    def _end_block(self) -> None:
        self._hashes.append(self._hasher.digest())
        self._hasher, self._left = blake3(), self._step
