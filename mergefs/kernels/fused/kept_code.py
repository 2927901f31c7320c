"""Machine code of kernels on disk, so that the next process needs no compiler.

It lies in the directory that ``MERGEFS_KERNELS`` names; else beside the sources that it was made from, as Python's own
byte code does, or where nobody may write there in the user's cache. Names of files have hashes of what they were made
from; code that was made from other sources goes when new code is kept.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from mergefs.kernels.fused import types
from mergefs.kernels.fused.machine_code import MachineCode, circumstances

PLACE: Final = "MERGEFS_KERNELS"
"""The environment variable that may name the directory."""

_SUFFIX: Final = ".kernel"
_NAME_BYTES: Final = 8
_DIGEST_BYTES: Final = 32
_LENGTH_BYTES: Final = 8


class KeptCode:
    """The machine code of one kernel for arguments of some types, if the disk has it."""

    def __init__(self, function: Callable[..., Any], signature: types.Signature) -> None:
        source = Path(function.__code__.co_filename)
        purpose = f"{function.__module__}.{function.__qualname__}", repr(signature), circumstances()
        sources = sources_digest(Path(__file__).parent), sources_digest(source.parent)
        self._prefix = f"{source.stem}.{_name_of(purpose)}."
        self._name = f"{self._prefix}{_name_of(sources)}{_SUFFIX}"
        self._source = source

    def load(self) -> MachineCode | None:
        """Return the code; None where there is none, or none that is whole."""
        for directory in _directories(self._source):
            with suppress(OSError):
                found = _decode((directory / self._name).read_bytes())
                if found is not None:
                    return found
        return None

    def save(self, code: MachineCode) -> None:
        """Keep code for the next process, if the disk lets it."""
        for directory in _directories(self._source):
            with suppress(OSError):
                _write(directory / self._name, _encode(code))
                for other in directory.glob(f"{self._prefix}*{_SUFFIX}"):
                    if other.name != self._name:
                        other.unlink()
                return


def _directories(source: Path) -> Iterator[Path]:
    """Yield where code may lie that was made from a file."""
    chosen = os.environ.get(PLACE)
    if chosen:
        yield Path(chosen)
        return
    yield source.parent / "__pycache__"
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    yield Path(cache_home) / "mergefs" / "kernels"


def _name_of(made_of: tuple[str, ...]) -> str:
    """Return a part of the name of a file."""
    name: str = blake3(repr(made_of).encode()).hexdigest(_NAME_BYTES)
    return name


def _write(path: Path, data: bytes) -> None:
    """Write a file that nobody sees before it is whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)  # as Python's own: who installs for all compiles for all
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _encode(code: MachineCode) -> bytes:
    """Return a file: the digest of the rest, the length of the names, the names of what is called, the code."""
    names = json.dumps(code.calls).encode()
    rest = len(names).to_bytes(_LENGTH_BYTES, "little") + names + code.code
    return blake3(rest).digest() + rest


def _decode(data: bytes) -> MachineCode | None:
    """Return what a file holds, None where it is damaged."""
    digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if blake3(rest).digest() != digest:
        return None
    begin = _LENGTH_BYTES
    end = begin + int.from_bytes(rest[:begin], "little")
    return MachineCode(tuple(json.loads(rest[begin:end])), rest[end:])


@cache
def sources_digest(package: Path) -> str:
    """Return the digest of the sources of a package: a kernel is made of more of its modules than its own."""
    digest = blake3()
    for source in sorted(package.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
