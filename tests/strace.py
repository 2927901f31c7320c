"""What a process really asks the kernel for, as strace sees it: bytes read from each file, and which files it maps."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Every system call through which bytes of a file can reach a process, and those that would escape this list.
_READS: Final = ("read", "readv", "pread64", "preadv", "preadv2", "sendfile", "splice", "copy_file_range")
_MAPS: Final = ("mmap", "remap_file_pages")
_OTHERS: Final = ("openat", "open", "openat2", "io_uring_setup", "io_submit", "process_vm_readv")

_CALL: Final = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+|0x[0-9a-f]+|\?)")
_DESCRIPTOR: Final = re.compile(r"\d+<(?P<path>[^>]*)>")


@dataclass(frozen=True, slots=True)
class Trace:
    """``bytes_read`` by file, for every file of which any were read; ``mapped`` are the files that were mapped."""

    bytes_read: Mapping[Path, int]
    mapped: frozenset[Path]
    calls: frozenset[str]

    def total(self, files: Iterable[Path]) -> int:
        """Return the bytes that were read from ``files`` together."""
        return sum(self.bytes_read.get(path.resolve(), 0) for path in files)


def command(log_directory: Path, arguments: Sequence[str | Path]) -> list[str]:
    """Return the command line that runs ``arguments`` under strace, with one log for each thread."""
    log_directory.mkdir(parents=True, exist_ok=True)
    traced = ",".join((*_READS, *_MAPS, *_OTHERS))
    options = ["-ff", "-y", "--seccomp-bpf", "--signal=none", "--string-limit=0", f"--trace={traced}"]
    return ["strace", *options, "-o", str(log_directory / "log"), *map(str, arguments)]


def read_trace(log_directory: Path) -> Trace:
    """Return what the logs in ``log_directory`` say, once the traced process has ended."""
    bytes_read: Counter[Path] = Counter()
    mapped: set[Path] = set()
    calls: set[str] = set()
    logs = sorted(log_directory.glob("log.*"))
    assert logs, f"strace has written no log to {log_directory}"
    for log in logs:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            call = _CALL.match(line)
            if call is None:
                continue
            calls.add(call["name"])
            if (path := _source(call["name"], call["arguments"])) is None or call["result"].startswith(("-", "?")):
                continue
            if call["name"] in _MAPS:
                mapped.add(path)
            else:
                bytes_read[path] += int(call["result"])
    assert not calls & {"io_uring_setup", "io_submit", "process_vm_readv"}, f"reads that are not counted: {calls}"
    return Trace(dict(bytes_read), frozenset(mapped), frozenset(calls))


def run(log_directory: Path, arguments: Sequence[str | Path], environment: Mapping[str, str]) -> Trace:
    """Run a command to its end under strace, and return what it read. It must succeed."""
    result = subprocess.run(
        command(log_directory, arguments),
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return read_trace(log_directory)


def _source(name: str, arguments: str) -> Path | None:
    """Return the file that a call takes bytes from."""
    if name not in _READS and name not in _MAPS:
        return None
    descriptors = [Path(match["path"]) for match in _DESCRIPTOR.finditer(arguments)]
    if not descriptors:
        return None
    return descriptors[1] if name == "sendfile" and len(descriptors) > 1 else descriptors[0]
