"""A tree made of nothing, whose entries fail as their names say.

``/read/RuntimeError`` opens and fails in ``read`` with a RuntimeError, and so on for each method and each fault. What
has no path (``total_size``) fails as the file of that name in the control directory says.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from mergefs.errors import MergefsError, SourceChangedError
from mergefs.mount.tree import Attributes

MTIME_NS: Final = 1_700_000_000_123_456_789
BIG_SIZE: Final = 3 * (1 << 20) + 12_345


def pattern(offset: int, size: int) -> bytes:
    """Return the bytes of the big file from ``offset`` on: every 8 bytes are their own position."""
    first, last = offset // 8, (offset + size + 7) // 8
    whole = b"".join((8 * word).to_bytes(8, "little") for word in range(first, last))
    return whole[offset - 8 * first :][:size]


def _with_errno(code: int) -> OSError:
    return OSError(code, os.strerror(code) if code in errno.errorcode else "strange")


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception that a method raises, and the errno that a client must see for it."""

    make: Callable[[], BaseException]
    expected: int


FAULTS: Final[dict[str, Fault]] = {
    "OSError-without-errno": Fault(lambda: OSError("no number"), errno.EIO),
    "OSError-negative": Fault(lambda: _with_errno(-5), errno.EIO),
    "OSError-zero": Fault(lambda: _with_errno(0), errno.EIO),
    "OSError-no-such-errno": Fault(lambda: _with_errno(9999), errno.EIO),
    "OSError-ESTALE": Fault(lambda: _with_errno(errno.ESTALE), errno.ESTALE),
    "OSError-EACCES": Fault(lambda: _with_errno(errno.EACCES), errno.EACCES),
    "OSError-EINVAL": Fault(lambda: _with_errno(errno.EINVAL), errno.EIO),
    "OSError-ENOSYS": Fault(lambda: _with_errno(errno.ENOSYS), errno.EIO),
    "OSError-ENOTCONN": Fault(lambda: _with_errno(errno.ENOTCONN), errno.EIO),
    "KeyboardInterrupt": Fault(KeyboardInterrupt, errno.EIO),
    "SystemExit": Fault(lambda: SystemExit(0), errno.EIO),
    "MemoryError": Fault(MemoryError, errno.ENOMEM),
    "RuntimeError": Fault(lambda: RuntimeError("broken"), errno.EIO),
    "StopIteration": Fault(StopIteration, errno.EIO),
    "MergefsError": Fault(lambda: MergefsError("a sentence for people"), errno.EIO),
    "SourceChangedError": Fault(lambda: SourceChangedError("the source a.safetensors has changed"), errno.ESTALE),
}

# What a faulty method returns in place of raising; all are EIO for the client.
WRONG_ANSWERS: Final[dict[str, dict[str, object]]] = {
    "attributes": {
        "None": None,
        "size-is-text": Attributes(7, False, cast(int, "12"), MTIME_NS),
        "size-is-negative": Attributes(7, False, -1, MTIME_NS),
        "inode-is-zero": Attributes(0, False, 1, MTIME_NS),
        "time-is-a-float": Attributes(7, False, 1, cast(int, 1.5)),
    },
    "entries": {"None": None, "numbers": [1, 2]},
    "read": {
        "None": None,
        "short": b"123",
        "empty": b"",
        "long": b"x" * 5000,
        "text": "x" * 4096,
        "bytearray": bytearray(4096),
        "memoryview": memoryview(bytes(4096)),
    },
    "extended_attributes": {"None": None, "numbers": [1, 2]},
    "extended_attribute": {"None": None, "text": "text", "bytearray": bytearray(3)},
    "total_size": {"None": None, "text": "12"},
}

_DIRECTORIES: Final = frozenset({"entries"})
_FAULTY_SIZE: Final = 4096
_RAW_NAME: Final = os.fsdecode(b"caf\xe9.bin")  # not UTF-8
FILES: Final[dict[str, bytes]] = {
    "/config.json": b'{"model_type": "llama"}\n',
    "/empty": b"",
    "/sub/one.txt": b"one\n",
    "/sub/deeper/two.txt": b"two\n",
    "/ünïcode \N{SNOWMAN}.txt": b"snow\n",
    "/" + _RAW_NAME: b"bytes\n",
}
LINKS: Final[dict[str, str]] = {"/link": "sub/one.txt", "/dangling": "nowhere/ü"}
STATUS: Final[dict[str, Any]] = {
    "recipes": ["/recipes/ties.yml"],
    "plan_ids": ["p1"],
    "expert_bytes_read": 2048,
    "base_bytes_read": 0,
    "analysis_bytes_read": 0,
    "bytes_served": 1 << 20,
    "cache_bytes": 7,
    "cache_hits": 3,
    "cache_misses": 1,
}
_METHODS: Final = ("attributes", "entries", "open", "read", "release", "extended_attributes", "extended_attribute")


def _faulty_names(method: str) -> list[str]:
    return [*FAULTS, *WRONG_ANSWERS.get(method, {})]


class FakeTree:
    """The tree. ``control`` is a directory through which a test steers the server in the other process."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._paths: dict[int, str] = {}
        self._next = 0
        self.is_closed = False

    def _fail_by_name(self, method: str, path: str) -> tuple[Any] | None:
        """Raise, or return the wrong answer, that ``path`` names for ``method``; None where it names another method."""
        directory, _, name = path[1:].rpartition("/")
        if directory != method:
            return None
        return self._fail(method, name)

    def _fail(self, method: str, name: str) -> tuple[Any]:
        if name in FAULTS:
            raise FAULTS[name].make()
        answers = WRONG_ANSWERS.get(method, {})
        if name not in answers:
            raise _with_errno(errno.ENOENT)
        return (answers[name],)

    def _children(self, directory: str) -> list[str]:
        prefix = "/" if directory == "/" else directory + "/"
        paths = [*FILES, *LINKS, "/big.bin", "/slow.bin"]
        names = {path[len(prefix) :].split("/")[0] for path in paths if path.startswith(prefix)}
        return sorted(names | ({*_METHODS} if directory == "/" else set()))

    def attributes(self, path: str) -> Attributes:
        """See ``Tree``."""
        answer = self._fail_by_name("attributes", path)
        if answer is not None:
            return answer[0]  # type: ignore[no-any-return]
        inode = 2 + abs(hash_text(path))
        if path in LINKS:
            return Attributes(inode, False, len(LINKS[path]), MTIME_NS, LINKS[path])
        if path in FILES:
            return Attributes(inode, False, len(FILES[path]), MTIME_NS)
        if path in ("/big.bin", "/slow.bin"):
            return Attributes(inode, False, BIG_SIZE, MTIME_NS)
        directory, _, name = path[1:].rpartition("/")
        if directory in _METHODS and name in _faulty_names(directory):
            return Attributes(inode, directory in _DIRECTORIES, _FAULTY_SIZE, MTIME_NS)
        if path == "/" or path[1:] in _METHODS or self._children(path):
            return Attributes(1 if path == "/" else inode, True, 0, MTIME_NS)
        raise _with_errno(errno.ENOENT)

    def entries(self, path: str) -> Sequence[str]:
        """See ``Tree``."""
        answer = self._fail_by_name("entries", path)
        if answer is not None:
            return answer[0]  # type: ignore[no-any-return]
        if path[1:] in _METHODS:
            return _faulty_names(path[1:])
        return self._children(path)

    def open(self, path: str) -> int:
        """See ``Tree``."""
        self._fail_by_name("open", path)
        self._next += 1
        self._paths[self._next] = path
        return self._next

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """See ``Tree``."""
        path = self._paths[handle]
        answer = self._fail_by_name("read", path)
        if answer is not None:
            return answer[0]  # type: ignore[no-any-return]
        if path == "/slow.bin":
            (self._control / "reading").touch()
            deadline = time.monotonic() + 60
            while not (self._control / "go-on").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
        if path in ("/big.bin", "/slow.bin"):
            return pattern(offset, min(size, BIG_SIZE - offset))
        return FILES.get(path, bytes(_FAULTY_SIZE))[offset : offset + size]

    def release(self, handle: int) -> None:
        """See ``Tree``."""
        self._fail_by_name("release", self._paths.pop(handle))

    def extended_attributes(self, path: str) -> Sequence[str]:
        """See ``Tree``."""
        answer = self._fail_by_name("extended_attributes", path)
        if answer is not None:
            return answer[0]  # type: ignore[no-any-return]
        return ["user.mergefs.plan_id"]

    def extended_attribute(self, path: str, name: str) -> bytes:
        """See ``Tree``."""
        answer = self._fail_by_name("extended_attribute", path)
        if answer is not None:
            return answer[0]  # type: ignore[no-any-return]
        if name == "user.mergefs.status" and path == "/":
            return json.dumps(STATUS).encode()
        if name == "user.mergefs.plan_id":
            return b"plan-of-" + os.fsencode(path)
        raise _with_errno(errno.ENODATA)

    def total_size(self) -> int:
        """See ``Tree``."""
        control = self._control / "total_size"
        if control.exists():
            return self._fail("total_size", control.read_text())[0]  # type: ignore[no-any-return]
        return BIG_SIZE + sum(map(len, FILES.values()))

    def close(self) -> None:
        """See ``Tree``; leaves a mark that the test can see."""
        self.is_closed = True
        (self._control / "closed").touch()


def hash_text(text: str) -> int:
    """Return a number that is the same in every process."""
    return int.from_bytes(os.fsencode(text), "big") % (1 << 40)
