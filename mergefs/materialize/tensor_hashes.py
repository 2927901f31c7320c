"""Hashes of tensors, taken while their file goes by."""

from dataclasses import dataclass, field

from mergefs.materialize.manifest import TensorEntry
from mergefs.planner.plan import MergePlan, OutputFile, TensorPlan
from mergefs.statistics.hashing import ContentHasher


@dataclass(slots=True)
class TensorHashes:
    """Hashes the tensors of one weight file, which comes in order."""

    plan: MergePlan
    file: OutputFile
    _current: int = 0
    _hasher: ContentHasher | None = None
    _contents: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def update(self, offset: int, view: memoryview) -> list[str]:
        """Take the next bytes of the file, which lie at ``offset``, and return the tensors that end with them."""
        ended: list[str] = []
        while (hasher := self._hasher) is not None:
            begin = self.file.offsets[self._current]
            end = begin + self._tensor(self._current).nbytes
            if begin >= offset + len(view) and end > begin:
                return ended
            part = view[max(begin - offset, 0) : max(end - offset, 0)]
            hasher.update(part)
            if end > offset + len(view):
                return ended
            self._contents.append(hasher.finish())
            ended.append(self.file.tensors[self._current])
            self._current += 1
            self._begin()
        return ended

    def _begin(self) -> None:
        """Begin with the next tensor, where there is one."""
        self._hasher = None
        if self._current < len(self.file.tensors):
            tensor = self._tensor(self._current)
            self._hasher = ContentHasher(tensor.dtype, tensor.shape)

    def entries(self) -> dict[str, TensorEntry]:
        """Return the entry of every tensor, once the whole file has been seen."""
        found = {}
        for name, offset, digest in zip(self.file.tensors, self.file.offsets, self._contents, strict=True):
            tensor = self.plan.tensors[name]
            described = tensor.nbytes, tensor.dtype.name, tensor.shape
            found[name] = TensorEntry(self.file.name, offset, *described, digest.hex())
        return found

    def contents(self) -> dict[str, bytes]:
        """Return the digest of every tensor's contents, once the whole file has been seen."""
        return dict(zip(self.file.tensors, self._contents, strict=True))

    def _tensor(self, index: int) -> TensorPlan:
        return self.plan.tensors[self.file.tensors[index]]
