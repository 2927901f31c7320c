"""Hashes of a weight file and of its tensors, taken of its pieces while they go by."""

from collections.abc import Mapping, Sequence

from blake3 import blake3

from mergefs.materialize.manifest import FileEntry, TensorEntry
from mergefs.materialize.pieces import Pieces
from mergefs.planner.plan import OutputFile, TensorPlan
from mergefs.statistics.identity import content_digest


class FileHashes:
    """Gathers the hashes of one file, runs of which come in order, cut anywhere.

    Whoever brings a run has hashed the pieces that lie in it as a whole. Those that lie in several are hashed here;
    parts of them have hashes, too, by which runs are known for themselves (``Part``).
    """

    def __init__(self, file: OutputFile, tensors: Mapping[str, TensorPlan], pieces: Pieces) -> None:
        self._file = file
        self._plans = tensors
        self._pieces = pieces
        self._hashes: list[str] = []
        self._open = blake3()
        self._ended = 0

    def update(self, offset: int, view: memoryview, hashes: Sequence[str]) -> None:
        """Take the next run, and the hashes of the parts that pieces and its own ends cut it into (``Pieces.cuts``)."""
        bounds, first, end = self._pieces.bounds, len(self._hashes), offset + len(view)
        whole = self._pieces.within(offset, end)
        before = int(bounds[whole.start] > offset)
        if bounds[first] < offset:
            self._open.update(view[: bounds[first + 1] - offset])
            if bounds[first + 1] <= end:
                self._hashes.append(self._open.hexdigest())
        self._hashes += hashes[before : before + len(whole)]
        if offset <= bounds[len(self._hashes)] < end:
            self._open = blake3(view[bounds[len(self._hashes)] - offset :])

    def ended(self) -> list[str]:
        """Return the tensors of which all has been taken since this was last asked."""
        begin = self._ended
        while self._ended < len(self._file.tensors):
            if self._pieces.tensors[self._file.tensors[self._ended]].stop > len(self._hashes):
                break
            self._ended += 1
        return list(self._file.tensors[begin : self._ended])

    def file_entry(self) -> FileEntry:
        """Return the entry of the file, once all of it was taken."""
        return FileEntry.of_pieces(self._file.size, tuple(self._hashes))

    def entries(self) -> dict[str, TensorEntry]:
        """Return the entry of every tensor, once the whole file was taken."""
        contents = self.contents()
        found = {}
        for name, offset in zip(self._file.tensors, self._file.offsets, strict=True):
            tensor = self._plans[name]
            described = tensor.nbytes, tensor.dtype.name, tensor.shape
            found[name] = TensorEntry(self._file.name, offset, *described, contents[name].hex())
        return found

    def contents(self) -> dict[str, bytes]:
        """Return the digest of every tensor's contents, once the whole file was taken."""
        return {name: self._content(name) for name in self._file.tensors}

    def _content(self, name: str) -> bytes:
        tensor, numbers = self._plans[name], self._pieces.tensors[name]
        hashes = [bytes.fromhex(found) for found in self._hashes[numbers.start : numbers.stop]]
        return content_digest(tensor.dtype, tensor.shape, hashes)
