"""What a loss of power leaves: a log of system calls is replayed, and all that was not synced by then is dropped.

The strictest reading of POSIX: the bytes of a file are there as they were at its last sync, and a name is there if its
directory was synced since. A rename is one step, and durable with the first sync of either directory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

RECORDED: Final = (
    *("openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "renameat2"),
    *("mkdir", "rmdir", "unlink", "unlinkat"),
)

_LINE: Final = re.compile(r"(?P<pid>\d+)\s+(?P<rest>.*)")
_STRING: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PLACE: Final = re.compile(r"(?:AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>")


def recording(log: Path) -> list[str]:
    """Return the options with which strace writes a log to replay."""
    return ["-o", str(log), "-y", "-xx", "--string-limit=99999999", "-e", f"trace={','.join(RECORDED)}"]


@dataclass(eq=False)
class File:
    """The bytes of a file, and those that are on disk."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(eq=False)
class Folder:
    """The names in a directory, and those that are on disk."""

    entries: "dict[str, File | Folder]" = field(default_factory=dict)
    durable: "dict[str, File | Folder]" = field(default_factory=dict)


Tree = dict[str, "bytes | Tree"]


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that went well: ``start`` says that it begins, else it has ended."""

    name: str
    arguments: str
    start: bool


class Disk:
    """A directory, as the calls of a log leave it and as a loss of power does."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = _read_folder(root)
        self._renames: list[tuple[tuple[Folder, str], tuple[Folder, str]]] = []
        self._syncing: dict[str, bytes] = {}

    def apply(self, call: Call) -> None:
        """Let a call happen. Calls on other directories change nothing."""
        path = _path_of(call)
        found = self._find(path)
        if call.name in ("fsync", "fdatasync"):
            self._sync(path, found, call.start)
        elif not call.start:
            {
                "openat": self._open,
                "write": self._write,
                "pwrite64": self._write,
                "ftruncate": self._truncate,
                "mkdir": self._make,
                "rmdir": self._remove,
                "unlink": self._remove,
                "unlinkat": self._remove,
                "rename": self._rename,
                "renameat2": self._rename,
            }[call.name](path, found, call.arguments)

    def after_power_loss(self) -> Tree:
        """Return what is on the disk for good."""
        return _durable(self._folder)

    def _find(self, path: Path) -> "File | Folder | None":
        """Return what is at ``path``, None where nothing is or where it is elsewhere."""
        if not path.is_relative_to(self._root):
            return None
        found: File | Folder | None = self._folder
        for part in path.relative_to(self._root).parts:
            found = found.entries.get(part) if isinstance(found, Folder) else None
        return found

    def _parent(self, path: Path) -> Folder | None:
        parent = self._find(path.parent)
        return parent if isinstance(parent, Folder) else None

    def _open(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        parent = self._parent(path)
        if "O_CREAT" in arguments and parent is not None and found is None:
            parent.entries[path.name] = File()

    def _write(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        if not isinstance(found, File):
            return
        data = _strings(arguments)[0]
        numbers = arguments.rpartition('"')[2].strip(", ").split(",")
        offset = int(numbers[1]) if len(numbers) > 1 else len(found.content)
        if len(found.content) < offset:
            found.content.extend(bytes(offset - len(found.content)))
        found.content[offset : offset + len(data)] = data

    def _truncate(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        if isinstance(found, File):
            size = int(arguments.rpartition(",")[2])
            found.content = found.content[:size] + bytes(max(size - len(found.content), 0))

    def _make(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        parent = self._parent(path)
        if parent is not None:
            parent.entries[path.name] = Folder()

    def _remove(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        parent = self._parent(path)
        if parent is not None:
            parent.entries.pop(path.name, None)

    def _rename(self, path: Path, found: "File | Folder | None", arguments: str) -> None:
        target = Path(_strings(arguments)[1].decode())
        source_folder, target_folder = self._parent(path), self._parent(target)
        if source_folder is None or target_folder is None or found is None:
            return
        replaced = target_folder.entries.get(target.name)
        target_folder.entries[target.name] = found
        if "RENAME_EXCHANGE" in arguments and replaced is not None:
            source_folder.entries[path.name] = replaced
        else:
            del source_folder.entries[path.name]
        self._renames.append(((source_folder, path.name), (target_folder, target.name)))

    def _sync(self, path: Path, found: "File | Folder | None", start: bool) -> None:
        if isinstance(found, File):
            if start:
                self._syncing[str(path)] = bytes(found.content)
            else:
                found.durable = self._syncing.pop(str(path))
        elif isinstance(found, Folder) and not start:
            found.durable = dict(found.entries)
            for names in self._renames:
                if found in (names[0][0], names[1][0]):
                    for folder, name in names:
                        _settle(folder, name)


def _settle(folder: Folder, name: str) -> None:
    """Make one name of a directory durable as it is."""
    if name in folder.entries:
        folder.durable[name] = folder.entries[name]
    else:
        folder.durable.pop(name, None)


def _read_folder(path: Path) -> Folder:
    """Return a directory of the disk, all of it durable."""
    folder = Folder()
    for entry in path.iterdir():
        if entry.is_dir():
            folder.entries[entry.name] = _read_folder(entry)
        else:
            data = entry.read_bytes()
            folder.entries[entry.name] = File(bytearray(data), data)
    folder.durable = dict(folder.entries)
    return folder


def _durable(folder: Folder) -> Tree:
    return {
        name: entry.durable if isinstance(entry, File) else _durable(entry) for name, entry in folder.durable.items()
    }


def write_tree(tree: Tree, directory: Path) -> None:
    """Write a tree into a new directory."""
    directory.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            write_tree(content, directory / name)


def read_calls(log: Path) -> Iterator[Call]:
    """Yield the calls of a log in the order in which they began and ended."""
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        match = _LINE.fullmatch(line)
        assert match is not None, line[:200]
        pid, rest = match["pid"], match["rest"]
        if "syscall_0x" in rest.partition("(")[0].partition("resumed")[0]:
            continue  # strace tells of every call that it has no name for, and such a one changes nothing
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").rstrip()
            name, _, arguments = begun[pid].partition("(")
            yield Call(name, arguments, start=True)
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>", rest)
        whole = begun.pop(pid) + rest[resumed.end() :] if resumed else rest
        call, _, result = whole.rpartition(" = ")
        name, _, arguments = call.rstrip().removesuffix(")").partition("(")
        if not arguments or result.startswith(("-1", "?")):
            continue
        if not resumed:
            yield Call(name, arguments, start=True)
        yield Call(name, arguments, start=False)


def _strings(arguments: str) -> list[bytes]:
    return [_unescape(text) for text in _STRING.findall(arguments)]


def _unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _path_of(call: Call) -> Path:
    """Return the file that a call is about, the first one of several."""
    if call.name in ("write", "pwrite64", "ftruncate", "fsync", "fdatasync"):
        place = _PLACE.match(call.arguments)
        return Path("/") if place is None else Path(_unescape(place[1]).decode(errors="replace"))
    place = _PLACE.match(call.arguments)
    name = Path(_strings(call.arguments)[0].decode())
    return (Path(_unescape(place[1]).decode()) if place else Path.cwd()) / name
