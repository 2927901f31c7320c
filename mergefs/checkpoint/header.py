"""The header of a safetensors file: read under strict rules, and written.

A safetensors file is ``N`` (8 bytes, little-endian), ``N`` bytes of JSON, and the data of the tensors. The reader
trusts nothing: a header that it returns describes every byte of the file exactly once, so the rest of mergefs can
turn offsets into reads without looking again.
"""

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from mergefs.checkpoint.dtypes import DTYPES, DType
from mergefs.errors import CheckpointError, SourceReadError

MAX_HEADER_BYTES: Final = 100_000_000
METADATA_KEY: Final = "__metadata__"

_LENGTH: Final = struct.Struct("<Q")
_U64_MAX: Final = 2**64 - 1
_ENTRY_KEYS: Final = ("dtype", "shape", "data_offsets")
_ENTRY_KEY_SET: Final = frozenset(_ENTRY_KEYS)
_REMEDY: Final = "download or write this file again"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file; ``begin`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The checked header of one safetensors file.

    ``tensors`` are in the order of their offsets, ``data_start`` is where the first begins (8 + N), and ``digest``
    is the blake3 hash, in hexadecimal, of the 8 + N bytes before it.
    """

    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    digest: str


class _RepeatedKeyObject(dict[str, Any]):
    """A JSON object that names a key twice; Python's parser would keep the last value without a word."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]


def read_header(descriptor: int, path: Path) -> ShardHeader:
    """Read and check the header of the safetensors file that is open as ``descriptor``.

    ``path`` is only named in errors. Raises CheckpointError when the file breaks a rule of the format, and
    SourceReadError when the operating system cannot give its bytes.
    """
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise SourceReadError(f"{path} cannot be read ({error.strerror}); check the file and its disk") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file; give a safetensors file")
    file_size = status.st_size
    if file_size < _LENGTH.size:
        raise _damaged(path, f"has {file_size} bytes, but a safetensors file has 8 at least")
    prefix = _read_exactly(descriptor, _LENGTH.size, 0, path)
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path,
            f"announces a header of {length} bytes, but safetensors headers have at most {MAX_HEADER_BYTES}",
        )
    data_start = _LENGTH.size + length
    if data_start > file_size:
        raise _damaged(path, f"announces a header of {length} bytes, but only {file_size - 8} follow")
    document = _read_exactly(descriptor, length, _LENGTH.size, path)
    entries, metadata = _parse_document(document, path)
    tensors = _check_layout([_parse_entry(n, e, path) for n, e in entries.items()], data_start, file_size, path)
    digest = blake3(prefix)
    digest.update(document)
    return ShardHeader(tensors, metadata, data_start, file_size, digest.hexdigest())


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    alignment: int = 8,
    beyond: int = 0,
) -> bytes:
    """Return the bytes before the data of a file that holds ``tensors`` one after the other, in the given order.

    Each tensor is (name, dtype, shape). ``__metadata__`` is left out when ``metadata`` is empty. The header is
    padded with spaces until the data starts ``beyond`` bytes behind a multiple of ``alignment`` bytes.

    Raises CheckpointError when no sound file can have this header (a name given twice or reserved, a name that is
    not Unicode text, a tensor that does not fill whole bytes, sizes beyond 64 bits, a header above 100 MB).
    """
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}, but must be at least 1")
    document: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        label = f"tensor {_quote(name)}"
        if name == METADATA_KEY:
            raise CheckpointError(f"{label} cannot be written: the name is reserved; rename the tensor")
        if name in document:
            raise CheckpointError(f"{label} cannot be written twice into one file; rename one of them")
        size, problem = _size_of(dtype, shape)
        if problem is None and offset + size > _U64_MAX:
            problem = "ends beyond the 64 bits of an offset"
        if problem is not None:
            raise CheckpointError(f"{label} cannot be written, because it {problem}; change its shape or dtype")
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    try:
        encoded = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{_quote(error.object)} holds a surrogate that UTF-8 cannot encode; rename the tensor or metadata key"
        ) from error
    encoded += b" " * ((beyond - _LENGTH.size - len(encoded)) % alignment)
    if len(encoded) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a header of {len(encoded)} bytes for {len(tensors)} tensors is above the {MAX_HEADER_BYTES} bytes that "
            "safetensors allows; write more shards"
        )
    return _LENGTH.pack(len(encoded)) + encoded


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} {problem}; {_REMEDY}")


def _quote(text: str) -> str:
    """Return ``text`` for a message: quoted, escaped, and cut when it is longer than a line."""
    return repr(text if len(text) <= 160 else text[:157] + "...")


def _read_exactly(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """Return ``size`` bytes at ``offset``: one pread may give fewer than asked."""
    pieces: list[bytes] = []
    missing = size
    while missing:
        try:
            piece = os.pread(descriptor, missing, offset + size - missing)
        except OSError as error:
            raise SourceReadError(f"{path} cannot be read ({error.strerror}); check the file and its disk") from error
        if not piece:
            raise _damaged(path, f"ended at byte {offset + size - missing} while its header was read")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _parse_document(document: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the tensors, unchecked, and the metadata of a header's JSON."""
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"has a header that is no UTF-8 text at byte {8 + error.start}") from error
    try:
        entries = json.loads(
            text, object_pairs_hook=_object, parse_int=_unsigned_integer, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise _damaged(path, "has a header whose JSON is nested too deeply") from error
    except ValueError as error:
        raise _damaged(path, f"has a header that is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, f"has a header that is a JSON {_json_type(entries)}, but must be an object")
    if isinstance(entries, _RepeatedKeyObject):
        raise _damaged(path, f"names tensor {_quote(entries.repeated)} twice in its header")
    metadata = _parse_metadata(entries.pop(METADATA_KEY), path) if METADATA_KEY in entries else {}
    for name in (*entries, *metadata, *metadata.values()) if "\\u" in text else ():
        # Only an escape can bring half a surrogate pair into text that was UTF-8.
        if not _is_unicode(name):
            raise _damaged(path, f"has {_quote(name)} in its header, which is no Unicode text")
    return entries, metadata


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    return result if len(result) == len(pairs) else _RepeatedKeyObject(pairs)


def _unsigned_integer(digits: str) -> int:
    """Return the value of ``digits``, or a number that no rule accepts where it is negative or beyond 64 bits.

    ``-0`` is such a number too: the format knows unsigned integers only.
    """
    if digits[0] == "-":
        return -1
    return int(digits) if len(digits) <= 20 else _U64_MAX + 1


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: object) -> str:
    """Return what JSON calls the type of ``value``."""
    if value is None:
        return "null"
    names = {dict: "object", list: "array", str: "string", bool: "boolean"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "number")


def _parse_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _damaged(path, f"has a {METADATA_KEY} that is a JSON {_json_type(value)}, but must be an object")
    if isinstance(value, _RepeatedKeyObject):
        raise _damaged(path, f"names {_quote(value.repeated)} twice in its {METADATA_KEY}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _damaged(
                path, f"has a {_json_type(text)} as {METADATA_KEY}[{_quote(key)}], but only strings are allowed there"
            )
    return value


def _parse_entry(name: str, entry: Any, path: Path) -> tuple[int, int, str, DType, tuple[int, ...]]:
    """Return (begin, end, name, dtype, shape) of one tensor; offsets count from the start of the data."""
    if type(entry) is not dict or entry.keys() != _ENTRY_KEY_SET:
        raise _damaged(path, f"has tensor {_quote(name)} in its header {_entry_problem(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        found = entry["dtype"]
        shown = _quote(found) if isinstance(found, str) else f"a JSON {_json_type(found)}"
        raise CheckpointError(
            f"{path} gives tensor {_quote(name)} the dtype {shown}, which is none of the safetensors format; "
            "convert the tensor, or download this file again if it is damaged"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not _is_list_of_unsigned(value):
            raise _damaged(path, f"has tensor {_quote(name)} with a {key} that is no list of unsigned 64-bit integers")
    if len(offsets) != 2:
        raise _damaged(path, f"has tensor {_quote(name)} with {len(offsets)} data_offsets, but needs 2")
    begin, end = offsets
    if end < begin:
        raise _damaged(path, f"has tensor {_quote(name)} with data_offsets [{begin}, {end}] that end before they begin")
    size, problem = _size_of(dtype, shape)
    if problem is None and size != end - begin:
        problem = f"needs {size} bytes as {dtype.name} of shape {shape}, but its data_offsets span {end - begin}"
    if problem is not None:
        raise _damaged(path, f"has tensor {_quote(name)} that {problem}")
    return begin, end, name, dtype, tuple(shape)


def _is_list_of_unsigned(value: object) -> bool:
    # A bool is an int to isinstance(), but not here.
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= _U64_MAX for number in value)


def _entry_problem(entry: object) -> str:
    """Return, as the end of a sentence, why ``entry`` does not describe a tensor."""
    if not isinstance(entry, dict):
        return f"as a JSON {_json_type(entry)}, but must describe it by an object"
    if isinstance(entry, _RepeatedKeyObject):
        return f"with the key {_quote(entry.repeated)} twice"
    missing = [key for key in _ENTRY_KEYS if key not in entry]
    if missing:
        return f"without {' and '.join(missing)}"
    unknown = ", ".join(_quote(key) for key in entry if key not in _ENTRY_KEYS)
    return f"with {unknown} beside dtype, shape and data_offsets"


def _size_of(dtype: DType, shape: Sequence[int]) -> tuple[int, str | None]:
    """Return the bytes of a tensor and None, or 0 and what is wrong with its size.

    Overflow is checked at each step, as the reference parser does: a zero at the end does not excuse a product
    that is beyond 64 bits before it.
    """
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > _U64_MAX:
            return 0, f"has more elements in its shape {list(shape)} than 64 bits can count"
    bits = elements * dtype.bits
    if bits > _U64_MAX:
        return 0, f"has more bits in its shape {list(shape)} of {dtype.name} than 64 bits can count"
    if bits % 8:
        return 0, f"has {bits} bits as {dtype.name} of shape {list(shape)}, which do not fill whole bytes"
    return bits // 8, None


def _check_layout(
    entries: list[tuple[int, int, str, DType, tuple[int, ...]]], data_start: int, file_size: int, path: Path
) -> tuple[TensorHeader, ...]:
    """Return the tensors in the order of their offsets, which must cover the data without hole or overlap."""
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    previous: str | None = None
    tensors: list[TensorHeader] = []
    for begin, end, name, dtype, shape in entries:
        if begin != position:
            before = "the start of the data" if previous is None else f"tensor {_quote(previous)}"
            what = "a hole" if begin > position else "an overlap"
            raise _damaged(
                path, f"has {what} of {abs(begin - position)} bytes between {before} and tensor {_quote(name)}"
            )
        tensors.append(TensorHeader(name, dtype, shape, data_start + begin, data_start + end))
        position, previous = end, name
    expected = data_start + position
    if expected > file_size:
        raise _damaged(path, f"is cut off: its header describes {expected} bytes, but the file has {file_size}")
    if expected < file_size:
        raise _damaged(path, f"has {file_size - expected} bytes after the {expected} that its header describes")
    return tuple(tensors)
