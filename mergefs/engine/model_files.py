"""Everything that the merged model's directory holds: merged weights, generated files, and the donor's own files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint
from mergefs.engine.engine import Engine
from mergefs.engine.file_blocks import FileBlocks
from mergefs.engine.resources import Resources
from mergefs.engine.shortage import despite_shortage
from mergefs.planner.documents import documents
from mergefs.planner.plan import MergePlan
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader, check_unchanged


@dataclass(frozen=True, slots=True)
class _Generated:
    """A file whose bytes were made with the plan."""

    data: bytes


@dataclass(frozen=True, slots=True)
class _Merged:
    """A weight file, computed as it is read."""


_Content = _Generated | _Merged | AuxiliaryFile


class ModelFiles:
    """The files of one merged model by name; what a mount shows, and what ``materialize`` writes."""

    def __init__(self, plan: MergePlan, resources: Resources, strict: bool) -> None:
        self.plan = plan
        self.engine = Engine(plan, resources, strict)
        self._resources = resources
        self._contents: dict[str, _Content] = {
            name: _Generated(content) if isinstance(content, bytes) else content
            for name, content in plan.companions.items()
        }
        self._contents |= {name: _Generated(data) for name, data in documents(plan).items()}
        self._contents |= {file.name: _Merged() for file in plan.files}
        self.sizes: Mapping[str, int] = {name: self._size(name) for name in sorted(self._contents)}

    def _size(self, name: str) -> int:
        content = self._contents[name]
        if isinstance(content, _Generated):
            return len(content.data)
        if isinstance(content, AuxiliaryFile):
            return content.fingerprint.size
        return next(file.size for file in self.plan.files if file.name == name)

    @property
    def read_files(self) -> frozenset[tuple[Path, Fingerprint]]:
        """The files that are read for it, as they were when it was planned."""
        weights = (file for source in self.plan.sources for file in source.checked_files)
        copied = (content for content in self._contents.values() if isinstance(content, AuxiliaryFile))
        files = (*weights, *copied, *self.plan.plane_files)
        return frozenset((file.path, file.fingerprint) for file in files)

    @property
    def reader(self) -> SourceReader:
        """What reads its sources."""
        return self._resources.reader

    def is_merged(self, name: str) -> bool:
        """Return whether ``name`` is a weight file."""
        return isinstance(self._contents[name], _Merged)

    def blocks(self, name: str) -> FileBlocks | None:
        """Return what can be computed ahead of a file's readers; None where nothing is computed."""
        return FileBlocks(self.engine, name, self.sizes[name]) if self.is_merged(name) else None

    def check(self, name: str) -> None:
        """Raise SourceChangedError when the file can no longer be read as it was planned."""
        content = self._contents[name]
        if isinstance(content, _Merged):
            self.engine.check_sources()
        elif isinstance(content, AuxiliaryFile):
            check_unchanged([content])

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a file from ``offset``; fewer only where the file ends."""
        content = self._contents[name]
        if isinstance(content, _Merged):
            return despite_shortage(lambda: self.engine.read_file(name, offset, size), self._resources.cache)
        if isinstance(content, _Generated):
            data = content.data[offset : offset + size]
        else:
            wanted = max(min(size, content.fingerprint.size - offset), 0)
            data = self._resources.reader.read(content, offset, wanted, Purpose.AUXILIARY).tobytes()
        self._resources.ledger.record_served(len(data))
        return data

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a weight file from ``offset``; see ``Engine.read_into``."""
        self.engine.read_into(name, offset, view)
