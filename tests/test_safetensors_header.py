"""The header reader against the rules of the format and the verdict of the reference parser; the header writer."""

import errno
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from blake3 import blake3
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mergefs.checkpoint import DTYPES, DType, ShardHeader, encode_header, read_header
from mergefs.errors import CheckpointError, SourceReadError

PATH = Path("/models/a/model.safetensors")
WHOLE_BYTE_DTYPES = [dtype for dtype in DTYPES.values() if dtype.bits % 8 == 0]
ENTRY = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this JSON as its header."""
    encoded = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(encoded)) + encoded + data


def read(content: bytes) -> ShardHeader:
    descriptor = os.memfd_create("safetensors")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        return read_header(descriptor, PATH)
    finally:
        os.close(descriptor)


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    return str(caught.value)


def reference(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return the tensors that the reference parser finds, or None when it refuses the file."""
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def found_by_mergefs(header: ShardHeader, content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.dtype.name, t.shape, content[t.begin : t.end]) for t in header.tensors}


class Pairs(list[tuple[str, Any]]):
    """A JSON object with all its keys, the repeated ones too."""


def stricter_rules(content: bytes) -> set[str]:
    """Return which rules of the format this file breaks that the reference parser does not enforce.

    This is the whole list; it is worked out from the JSON alone, without the reader under test.
    """
    (length,) = struct.unpack("<Q", content[:8])
    document = json.loads(content[8 : 8 + length], object_pairs_hook=Pairs)
    names = [name for name, _ in document]
    rules = {"a tensor named twice"} if len(set(names)) < len(names) else set()
    for name, entry in document:
        if name == "__metadata__":
            if entry is None:
                rules.add("metadata that is null")
            elif len({key for key, _ in entry}) < len(entry):
                rules.add("a metadata key given twice")
        elif not isinstance(entry, Pairs):
            rules.add("an entry that is an array")
        else:
            if {key for key, _ in entry} != {"dtype", "shape", "data_offsets"}:
                rules.add("an unknown key in an entry")
            if not isinstance(dict(entry).get("dtype"), str):
                rules.add("a dtype that is an object")
    return rules


def assert_agrees_with_the_reference(content: bytes) -> None:
    expected = reference(content)
    try:
        header = read(content)
    except CheckpointError as error:
        assert_is_one_helpful_sentence(error)
        assert expected is None or stricter_rules(content), f"refused without a rule: {error}"
    else:
        assert expected is not None, "the reference parser refuses this file"
        assert found_by_mergefs(header, content) == expected


def assert_is_one_helpful_sentence(error: CheckpointError) -> None:
    message = str(error)
    assert message.startswith(f"{PATH} "), message
    assert "\n" not in message
    assert re.search(r"; (download|convert|give|check) ", message), f"no remedy: {message}"


# Headers made by hypothesis --------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def described_tensors(draw: st.DrawFn) -> list[tuple[str, DType, tuple[int, ...]]]:
    names = draw(st.lists(NAMES, max_size=5, unique=True))
    dtypes = [draw(st.sampled_from(list(DTYPES.values()))) for _ in names]
    shapes = [draw(SHAPES) for _ in names]
    # Eight elements more in the last dimension make whole bytes of any type.
    return [
        (name, dtype, tuple(shape) if dtype.bits % 8 == 0 else (*shape, 8))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]


def document_of(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> tuple[dict[str, Any], int]:
    """Return the header of these tensors as JSON data, and the bytes of their data; not by encode_header."""
    document: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.bits // 8
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return document, offset


ODD_NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 255, 2**32, 2**61, 2**63, 2**64 - 1, 2**64, -1, 10**30])
ODD_VALUES: st.SearchStrategy[Any] = st.one_of(
    ODD_NUMBERS,
    st.sampled_from([None, True, False, 1.0, 1e300, "", "U8", "F4", "F6_E3M2", "BF16", "F128", {}, [], {"U8": None}]),
    st.lists(ODD_NUMBERS, max_size=3),
)


@st.composite
def damaged_documents(draw: st.DrawFn) -> bytes:
    """A file whose header was sound until up to three of its values were replaced, moved, added or dropped."""
    tensors = draw(described_tensors())
    document, size = document_of(tensors)
    metadata = draw(st.sampled_from(["none", "none", "sound", "sound", "odd"]))
    if metadata != "none":
        sound = st.dictionaries(NAMES, NAMES, max_size=2)
        document["__metadata__"] = draw(sound if metadata == "sound" else ODD_VALUES)
    entries = [entry for name, entry in document.items() if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 3)) if entries else 0):
        entry = draw(st.sampled_from(entries))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        match draw(st.sampled_from(["replace", "drop", "nudge", "nudge", "nudge", "swap", "swap", "entry"])):
            case "replace":
                entry[key] = draw(ODD_VALUES)
            case "drop":
                entry.pop(key, None)
            case "nudge" if isinstance(entry.get(key), list) and entry[key]:
                place = draw(st.integers(0, len(entry[key]) - 1))
                if isinstance(entry[key][place], int):
                    entry[key][place] += draw(st.sampled_from([-8, -1, 1, 8]))
            case "swap":
                other = draw(st.sampled_from(entries))
                if key in entry and key in other:
                    entry[key], other[key] = other[key], entry[key]
            case "entry":
                document[draw(st.sampled_from(list(document)))] = draw(ODD_VALUES)
    size += draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8]))
    padding = draw(st.sampled_from([*[""] * 15, " ", "\n\t \r", "\0", "x", "{}"]))
    text = json.dumps(document, ensure_ascii=draw(st.booleans())) + padding
    return file_of(text, bytes(max(0, size)))


@given(described_tensors(), st.dictionaries(NAMES, NAMES, max_size=3), st.sampled_from([0, 1, 7, 4096]))
def test_every_sound_header_is_read_as_the_reference_parser_reads_it(
    tensors: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str], padding: int
) -> None:
    document, size = document_of(tensors)
    text = json.dumps({"__metadata__": metadata, **document}) + " " * padding
    content = file_of(text, bytes(index % 251 for index in range(size)))

    header = read(content)

    assert found_by_mergefs(header, content) == reference(content)
    assert header.metadata == metadata
    assert header.file_size == len(content)


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_documents())
def test_a_header_with_wrong_values_gets_the_verdict_of_the_reference_parser(content: bytes) -> None:
    assert_agrees_with_the_reference(content)


FRAGMENTS = st.sampled_from(
    [
        *(
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            " ",
            "\n",
            '"',
            "\\",
            "null",
            "true",
            "0",
            "1",
            "-0",
            "01",
            "1.0",
            "1e2",
            "NaN",
        ),
        *("Infinity", '"a"', '"b"', '"\\u0061"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"'),
        *('"a":', '"dtype":"U8"', '"shape":[1]', '"data_offsets":[0,1]', '"__metadata__":', '{"k":"v"}', ENTRY),
        *('"a":' + ENTRY, '"__metadata__":{}', "\x00", "\x1f", "\x7f", "é", "\u2028", "\ufeff", "\U0001f600"),
    ]
)


@settings(max_examples=600)
@given(st.lists(FRAGMENTS, max_size=8), st.booleans(), st.integers(0, 2))
@example(["[" * 200_000], False, 0)
@example(['"a":' + '{"x":' * 100_000], True, 0)
@example(['"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}'], True, 1)
def test_a_header_of_random_fragments_of_json_gets_the_verdict_of_the_reference_parser(
    fragments: list[str], braced: bool, size: int
) -> None:
    text = "".join(fragments)
    assert_agrees_with_the_reference(file_of("{" + text + "}" if braced else text, bytes(size)))


@settings(max_examples=600)
@given(st.data())
def test_a_real_file_with_damaged_bytes_gets_the_verdict_of_the_reference_parser(data: st.DataObject) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "model.norm.weight": np.ones(3, np.float32),
        "b": np.zeros((2, 2), np.int8),
        "é": np.zeros(0, np.float16),
    }
    content = bytearray(save(arrays, metadata={"format": "pt"}))
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 8 + length))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "cut"])):
            case "replace":
                content[position : position + 1] = bytes([data.draw(st.integers(0, 255))])
            case "insert":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=3))
            case "delete":
                del content[position : position + data.draw(st.integers(1, 4))]
            case "cut":
                del content[data.draw(st.integers(0, len(content))) :]
    assert_agrees_with_the_reference(bytes(content))


# What the format forbids and the reference parser accepts ------------------------------------------------------------

STRICTER = {
    "a tensor named twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', b"x", "names tensor 'a' twice"),
    "a metadata key given twice": ('{"__metadata__":{"k":"1","k":"2"}}', b"", "names 'k' twice in its __metadata__"),
    "metadata that is null": ('{"__metadata__":null}', b"", "__metadata__ that is a JSON null"),
    "an entry that is an array": ('{"a":["U8",[1],[0,1]]}', b"x", "tensor 'a' in its header as a JSON array"),
    "an unknown key in an entry": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"scale":1}}',
        b"x",
        "tensor 'a' in its header with 'scale' beside dtype",
    ),
    "a dtype that is an object": (
        '{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "gives tensor 'a' the dtype a JSON object",
    ),
}


@pytest.mark.parametrize("rule", STRICTER)
def test_stricter_than_the_reference_parser_where_the_format_forbids(rule: str) -> None:
    header, data, sentence = STRICTER[rule]
    content = file_of(header, data)
    assert reference(content) is not None
    assert stricter_rules(content) == {rule}
    assert sentence in refusal(content)


# One sentence for each rule ------------------------------------------------------------------------------------------


def entry(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]") -> str:
    return f'{{"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


BROKEN = {
    "an empty file": (b"", "has 0 bytes, but a safetensors file has 8 at least"),
    "seven bytes": (bytes(7), "has 7 bytes"),
    "a header above 100 MB": (
        struct.pack("<Q", 100_000_001) + b"{}",
        "announces a header of 100000001 bytes, but safetensors headers have at most 100000000",
    ),
    "a header of 2**64-1 bytes": (b"\xff" * 8, "announces a header of 18446744073709551615 bytes"),
    "a header beyond the end": (struct.pack("<Q", 3) + b"{}", "announces a header of 3 bytes, but only 2 follow"),
    "a header of no bytes": (bytes(8), "has a header that is no JSON"),
    "bytes that are no UTF-8": (file_of(b'{"\xff":1}'), "no UTF-8 text at byte 10"),
    "no JSON": (file_of("{]"), "has a header that is no JSON"),
    "NaN": (file_of(entry(shape="[NaN]"), b"x"), "NaN is no JSON number"),
    "text after the JSON": (file_of("{}x"), "Extra data"),
    "zero bytes after the JSON": (file_of("{}\0\0"), "Extra data"),
    "an array": (file_of("[]"), "is a JSON array, but must be an object"),
    "null": (file_of("null"), "is a JSON null, but must be an object"),
    "nested too deeply": (file_of("[" * 200_000), "nested too deeply"),
    "half a surrogate pair": (file_of('{"\\ud800":' + ENTRY + "}", b"x"), r"has '\ud800' in its header, which is no"),
    "half a surrogate pair in the metadata": (
        file_of('{"__metadata__":{"k":"\\udc00"}}'),
        r"has '\udc00' in its header",
    ),
    "metadata twice": (file_of('{"__metadata__":{},"__metadata__":{}}'), "names tensor '__metadata__' twice"),
    "metadata that is a list": (file_of('{"__metadata__":[]}'), "__metadata__ that is a JSON array"),
    "a number in the metadata": (file_of('{"__metadata__":{"k":1}}'), "has a number as __metadata__['k']"),
    "an entry that is a number": (file_of('{"w":1}'), "tensor 'w' in its header as a JSON number"),
    "an entry without keys": (
        file_of('{"w":{"dtype":"U8"}}'),
        "tensor 'w' in its header without shape and data_offsets",
    ),
    "a key twice in an entry": (
        file_of('{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "tensor 'w' in its header with the key 'dtype' twice",
    ),
    "an unknown dtype": (file_of(entry(dtype='"F128"'), b"x"), "gives tensor 'w' the dtype 'F128'"),
    "a shape that is no list": (file_of(entry(shape="1"), b"x"), "'w' with a shape that is no list of unsigned"),
    "a boolean in the shape": (file_of(entry(shape="[true]"), b"x"), "'w' with a shape that is no list of unsigned"),
    "a fraction in the shape": (file_of(entry(shape="[1.0]"), b"x"), "'w' with a shape that is no list of unsigned"),
    "a negative shape": (file_of(entry(shape="[-1]"), b"x"), "'w' with a shape that is no list of unsigned"),
    "a negative zero": (file_of(entry(offsets="[-0,1]"), b"x"), "'w' with a data_offsets that is no list of unsigned"),
    "an offset beyond 64 bits": (
        file_of(entry(offsets="[0,18446744073709551616]"), b"x"),
        "'w' with a data_offsets that is no list of unsigned",
    ),
    "a number of five thousand digits": (
        file_of(entry(shape="[" + "9" * 5000 + "]"), b"x"),
        "'w' with a shape that is no list of unsigned",
    ),
    "three offsets": (file_of(entry(offsets="[0,1,1]"), b"x"), "'w' with 3 data_offsets, but needs 2"),
    "offsets that run backwards": (file_of(entry(offsets="[1,0]"), b"x"), "[1, 0] that end before they begin"),
    "a size that does not fit": (
        file_of(entry(dtype='"F32"', shape="[2,3]", offsets="[0,20]"), bytes(20)),
        "'w' that needs 24 bytes as F32 of shape [2, 3], but its data_offsets span 20",
    ),
    "too many elements": (file_of(entry(shape=f"[{2**63},2,0]", offsets="[0,0]")), "more elements in its shape"),
    "too many bits": (file_of(entry(shape=f"[{2**61}]", offsets="[0,0]")), "more bits in its shape"),
    "half a byte": (
        file_of(entry(dtype='"F4"', shape="[3]", offsets="[0,1]"), b"x"),
        "'w' that has 12 bits as F4 of shape [3], which do not fill whole bytes",
    ),
    "a hole before the first tensor": (
        file_of(entry(offsets="[1,2]"), b"xx"),
        "a hole of 1 bytes between the start of the data and tensor 'w'",
    ),
    "a hole between tensors": (
        file_of(f'{{"v":{ENTRY},"w":{{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}}}', b"xxxx"),
        "a hole of 2 bytes between tensor 'v' and tensor 'w'",
    ),
    "an overlap": (
        file_of(
            '{"v":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
        )
        + b"xxxx",
        "an overlap of 1 bytes between tensor 'v' and tensor 'w'",
    ),
    "two tensors in the same place": (
        file_of(f'{{"v":{ENTRY},"w":{ENTRY}}}', b"x"),
        "an overlap of 1 bytes between tensor 'v' and tensor 'w'",
    ),
    "data that is cut off": (
        file_of(entry(shape="[9]", offsets="[0,9]"), b"x"),
        "is cut off: its header describes 70 bytes, but the file has 62",
    ),
    "bytes after the last tensor": (file_of("{}", b"abc"), "has 3 bytes after the 10 that its header describes"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_each_broken_rule_has_its_sentence(damage: str) -> None:
    content, sentence = BROKEN[damage]
    assert reference(content) is None
    with pytest.raises(CheckpointError) as caught:
        read(content)
    assert sentence in str(caught.value)
    assert_is_one_helpful_sentence(caught.value)


def test_a_very_long_name_is_cut_in_the_sentence() -> None:
    assert len(refusal(file_of('{"' + "n" * 100_000 + '":1}'))) < 400


# What is allowed ----------------------------------------------------------------------------------------------------


def test_a_file_without_tensors_is_sound() -> None:
    header = read(file_of("{}"))
    assert (header.tensors, dict(header.metadata), header.data_start, header.file_size) == ((), {}, 10, 10)


def test_scalars_and_tensors_without_elements_are_sound() -> None:
    content = file_of(
        '{"empty":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]},'
        '"none":{"dtype":"F4","shape":[0],"data_offsets":[0,0]},'
        '"scalar":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        bytes(4),
    )
    shapes = {tensor.name: (tensor.shape, tensor.end - tensor.begin) for tensor in read(content).tensors}
    assert shapes == {"none": ((0,), 0), "scalar": ((), 4), "empty": ((0, 7), 0)}
    assert reference(content) is not None


def test_tensors_are_in_the_order_of_their_offsets_whatever_the_order_of_the_json() -> None:
    later = '{"dtype":"U8","shape":[2],"data_offsets":[1,3]}'
    header = read(file_of(f'{{"later":{later},"sooner":{ENTRY}}}', b"xyz"))
    assert [(t.name, t.begin - header.data_start, t.end - header.data_start) for t in header.tensors] == [
        ("sooner", 0, 1),
        ("later", 1, 3),
    ]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_every_dtype_of_the_format_is_known_with_its_size(dtype: DType) -> None:
    content = file_of(entry(dtype=f'"{dtype.name}"', shape="[8]", offsets=f"[0,{dtype.bits}]"), bytes(dtype.bits))
    assert found_by_mergefs(read(content), content) == reference(content)


def test_the_digest_covers_the_header_and_nothing_else() -> None:
    content = file_of(entry(), b"a")
    first = read(content).digest
    assert first == blake3(content[:-1]).hexdigest()
    assert first == read(file_of(entry(), b"b")).digest
    assert first != read(file_of(entry() + " ", b"a")).digest


def test_a_hundred_thousand_tensors_are_read() -> None:
    described = [(f"model.layers.{number}.weight", DTYPES["BF16"], (1, 2)) for number in range(100_000)]
    encoded = encode_header(described, {})
    descriptor = os.memfd_create("large")
    try:
        os.write(descriptor, encoded)
        os.ftruncate(descriptor, len(encoded) + 400_000)
        header = read_header(descriptor, PATH)
    finally:
        os.close(descriptor)
    assert len(header.tensors) == 100_000
    assert header.tensors[-1].end == header.file_size


# The operating system ------------------------------------------------------------------------------------------------


def test_short_reads_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    content = file_of(entry() + " " * 100, b"x")
    whole = read(content)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 3), offset))
    assert read(content) == whole


def test_a_failing_read_names_the_file_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(SourceReadError, match=r"/models/a/model.safetensors cannot be read \(Input/output error\)"):
        read(file_of("{}"))


def test_a_file_that_shrinks_while_it_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, size, offset) if offset == 0 else b"")
    assert "ended at byte 8 while its header was read" in refusal(file_of("{}"))


def test_a_pipe_is_no_safetensors_file() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(CheckpointError, match="is not a regular file"):
            read_header(reading, PATH)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_closed_descriptor_is_an_error_for_people() -> None:
    descriptor = os.memfd_create("closed")
    os.close(descriptor)
    with pytest.raises(SourceReadError, match="Bad file descriptor"):
        read_header(descriptor, PATH)


# Writing -------------------------------------------------------------------------------------------------------------


def test_the_written_header_is_these_bytes() -> None:
    encoded = encode_header(
        [("bb", DTYPES["F32"], (2, 3)), ("a", DTYPES["BF16"], ()), ('é"', DTYPES["U8"], (0,))], {"format": "pt"}
    )
    assert encoded == (
        b"\xd0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},"bb":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"a":{"dtype":"BF16","shape":[],"data_offsets":[24,26]},'
        b'"\xc3\xa9\\"":{"dtype":"U8","shape":[0],"data_offsets":[26,26]}}       '
    )


def test_the_written_header_is_byte_for_byte_that_of_the_reference_writer() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b": np.zeros(5, np.float32),
        "é\n": np.zeros((), np.float32),
        "a": np.zeros((3, 1), np.float16),
    }
    described = [
        ("b", DTYPES["F32"], (5,)),
        ("é\n", DTYPES["F32"], ()),
        ("a", DTYPES["F16"], (3, 1)),
    ]
    data = bytes(30)
    assert encode_header(described, {"format": "pt"}) + data == save(arrays, metadata={"format": "pt"})
    assert encode_header(described, {}) + data == save(arrays)


@given(
    described_tensors(),
    st.dictionaries(NAMES, NAMES, max_size=3),
    st.sampled_from([1, 8, 64, 4096]),
)
def test_what_is_written_is_read_back_by_us_and_by_the_reference_parser(
    tensors: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str], alignment: int
) -> None:
    encoded = encode_header(tensors, metadata, alignment)
    _, size = document_of(tensors)
    content = encoded + bytes(size)

    header = read(content)

    assert {(t.name, t.dtype, t.shape) for t in header.tensors} == set(tensors)
    assert header.metadata == metadata
    assert header.data_start == len(encoded)
    assert len(encoded) % alignment == 0
    assert found_by_mergefs(header, content) == reference(content)


@given(st.lists(st.tuples(NAMES, st.sampled_from(WHOLE_BYTE_DTYPES), SHAPES), max_size=5, unique_by=lambda t: t[0]))
def test_data_lies_in_the_given_order(drawn: list[tuple[str, DType, list[int]]]) -> None:
    tensors = [(name, dtype, tuple(shape)) for name, dtype, shape in drawn]
    assume(all(0 not in shape for _, _, shape in tensors))
    encoded = encode_header(tensors, {})
    _, size = document_of(tensors)
    assert [tensor.name for tensor in read(encoded + bytes(size)).tensors] == [name for name, _, _ in tensors]


@pytest.mark.parametrize(
    ("tensors", "metadata", "sentence"),
    [
        ([("a", DTYPES["U8"], (1,)), ("a", DTYPES["U8"], (1,))], {}, "tensor 'a' cannot be written twice"),
        ([("__metadata__", DTYPES["U8"], (1,))], {"k": "v"}, "tensor '__metadata__' cannot be written: the name is"),
        ([("a", DTYPES["F4"], (1,))], {}, "tensor 'a' cannot be written, because it has 4 bits"),
        ([("a", DTYPES["U8"], (2**40, 2**40))], {}, "tensor 'a' cannot be written, because it has more elements"),
        (
            [(f"{n}", DTYPES["U8"], (2**60,)) for n in range(17)],
            {},
            "tensor '15' cannot be written, because it ends beyond",
        ),
        ([("\ud800", DTYPES["U8"], (1,))], {}, "holds a surrogate that UTF-8 cannot encode"),
        ([], {"k": "\udc00"}, "holds a surrogate that UTF-8 cannot encode"),
        ([("n" * 100_000_000, DTYPES["U8"], (1,))], {}, "is above the 100000000 bytes that safetensors allows"),
    ],
    ids=["twice", "reserved", "half a byte", "overflow", "too far", "surrogate", "surrogate in metadata", "too large"],
)
def test_a_header_that_no_sound_file_can_have_is_not_written(
    tensors: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        encode_header(tensors, metadata)
