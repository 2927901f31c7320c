"""What must be true of the records of each table. One declaration is all that a check consists of."""

import math
import zlib
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.catalog.check.evidence import Invariant, Subject
from mergefs.catalog.directory import PLANES
from mergefs.catalog.naming import key_of_entry
from mergefs.checkpoint.dtypes import DTYPES
from mergefs.sources.blocks import BlockGrid

_BINS: Final = 32_768
_SKETCH: Final = 128
"""Bytes of the sketch of a block."""
_STATES: Final = ("begun", "prepared", "committed", "aborted")
_WAYS: Final = ("mount", "materialize", "open")
_IDENTITY: Final = 48
"""Hexadecimal digits of an identity by content."""


def _is_hexadecimal(text: str, digits: int) -> bool:
    return len(text) == digits and not set(text) - set("0123456789abcdef")


def _is_local_identity(text: str) -> bool:
    return text.startswith("local-") and _is_hexadecimal(text.removeprefix("local-"), 64)


def _is_plan_id(text: str) -> bool:
    return _is_hexadecimal(text.removeprefix("local-"), 32)


def _whole(data: bytes, size: int, what: str) -> str | None:
    """Return what is wrong where ``data`` is no array of items of ``size`` bytes."""
    return f"{what} have {len(data)} bytes, no multiple of {size}" if len(data) % size else None


# -- models and statistics --------------------------------------------------------------------------------------------


def _checkpoint_names(subject: Subject) -> str | None:
    if not _is_local_identity(subject.key.decode()):
        return "its key is no local identity"
    if not subject.record.path.startswith("/"):
        return f"its path {subject.record.path!r} is not absolute"
    return None


def _checkpoint_numbers(subject: Subject) -> str | None:
    record = subject.record
    if record.tensors < 0 or record.total_bytes < 0:
        return f"it has {record.tensors} tensors of {record.total_bytes} bytes"
    return None


def _checkpoint_content(subject: Subject) -> str | None:
    content = subject.record.content
    return None if content is None or _is_hexadecimal(content, _IDENTITY) else f"its identity {content!r} is none"


def _content_sizes(subject: Subject) -> str | None:
    if len(subject.record.digest) != 24:
        return f"its digest has {len(subject.record.digest)} bytes and not 24"
    return _whole(subject.record.blocks, 32, "the hashes of its blocks")


def _content_alike(subject: Subject) -> str | None:
    record, known = subject.record, subject.evidence.blocks
    if known.setdefault(record.digest, blake3(record.blocks).digest()) != blake3(record.blocks).digest():
        return "another tensor has the same digest, and other hashes of its blocks"
    return None


def _delta_sizes(subject: Subject) -> str | None:
    record = subject.record
    if record.blocks < 0 or len(record.present) not in (0, math.ceil(record.blocks / 8)):
        return f"which of its {record.blocks} blocks changed is said with {len(record.present)} bytes"
    bits = np.unpackbits(np.frombuffer(record.present, dtype=np.uint8))
    entries = int(bits[: record.blocks].sum()) if record.present else record.blocks
    for name in ("changed", "squared_norms", "absolute_sums", "largest", "sketch_scales"):
        if len(getattr(record, name)) != 4 * entries:
            return f"its array {name} has {len(getattr(record, name))} bytes for {entries} blocks"
    if len(record.sketches) != _SKETCH * entries:
        return f"its sketches have {len(record.sketches)} bytes for {entries} blocks"
    return None


def _delta_values(subject: Subject) -> str | None:
    record = subject.record
    for name in ("squared_norms", "absolute_sums", "largest", "sketch_scales"):
        if wrong := _negative(getattr(record, name), f"its array {name}"):
            return wrong
    if not np.frombuffer(record.changed, dtype="<u4").all():
        return "a block that is said to have changed has no element that did"
    return None


def _norms(subject: Subject) -> str | None:
    norms = subject.record.squared_norms
    return _whole(norms, 4, "its norms") or _negative(norms, "its array of norms")


def _twin(subject: Subject) -> str | None:
    found = len(subject.record.local)
    return None if found == 24 else f"the key of its tensor has {found} bytes and not 24"


def _negative(packed: bytes, what: str) -> str | None:
    """Return what is wrong where an array of float32 has a number that is negative, infinite or none."""
    numbers = np.frombuffer(packed, dtype="<f4")
    sound = bool(((numbers >= 0) & np.isfinite(numbers)).all())
    return None if sound else f"{what} has a number that is negative or not finite"


def _histogram(subject: Subject) -> str | None:
    try:
        numbers = _short_numbers(zlib.decompress(subject.record.packed))
    except zlib.error as error:
        return f"it cannot be unpacked ({error})"
    if not numbers.size or numbers.size != 1 + 2 * numbers[0]:
        return f"it has {numbers.size} numbers"
    gaps, counts = numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
    if (gaps[1:] == 0).any() or gaps.sum() >= _BINS:
        return f"its bins do not ascend below {_BINS}"
    return None if counts.all() else "a bin that is kept is empty"


def _short_numbers(written: bytes) -> NDArray[np.int64]:
    """Return numbers of which each byte has seven bits, the lowest first, the highest bit set where more follow."""
    data = np.frombuffer(written, dtype=np.uint8).astype(np.int64)
    ends = np.flatnonzero(data < 128)
    if not ends.size:
        return ends
    starts = np.concatenate(([0], ends[:-1] + 1))
    sizes = ends - starts + 1
    shifts = 7 * (np.arange(sizes.sum()) - np.repeat(starts, sizes))
    found: NDArray[np.int64] = np.add.reduceat((data[: ends[-1] + 1] & 127) << np.minimum(shifts, 56), starts)
    return found


def _threshold_values(subject: Subject) -> str | None:
    key, cut = subject.record.key, subject.record.cut
    return None if 0 <= key < 2**64 and 0 <= cut < 2**63 else f"its key is {key} and its cut {cut}"


def _vector_sizes(subject: Subject) -> str | None:
    return _whole(subject.record.values, 8, "its numbers")


# -- planes -----------------------------------------------------------------------------------------------------------


def _planes_numbers(subject: Subject) -> str | None:
    record = subject.record
    if not 1 <= record.planes <= 8 or record.cell <= 0 or record.group <= 0 or record.offset < 0:
        return (
            f"it has {record.planes} planes of cells of {record.cell} elements, in groups of {record.group}, at "
            f"{record.offset}"
        )
    return None if len(record.digest) == 16 else f"its digest has {len(record.digest)} bytes and not 16"


def _planes_sizes(subject: Subject) -> str | None:
    record = subject.record
    if wrong := _whole(record.coded, 4, "its counts of elements"):
        return wrong
    if len(record.left) != (record.planes + 1) * len(record.coded):
        return f"it has {len(record.left)} bytes of errors for {len(record.coded) // 4} cells"
    return None


def _planes_values(subject: Subject) -> str | None:
    record = subject.record
    left = np.frombuffer(record.left, dtype="<f4").reshape(record.planes + 1, -1)
    if not (left >= 0).all() or (np.diff(left, axis=0) > 0).any():
        return "an error is negative, or rises with the level"
    return "a cell has bits for more elements than it has" if _largest(record.coded) > record.cell else None


def _largest(packed: bytes) -> int:
    return int(np.frombuffer(packed, dtype="<u4").max(initial=0))


def _planes_file(subject: Subject) -> str | None:
    record = subject.record
    name, _, suffix = record.file.partition(".")
    if not _is_hexadecimal(name, 32) or suffix != "planes":
        return f"its file {record.file!r} has no name of such files"
    try:
        found = (subject.evidence.path / PLANES / record.file).stat()
    except OSError as error:
        return f"its file {record.file} cannot be had ({error.strerror})"
    if (found.st_size, found.st_mtime_ns) != (record.file_size, record.mtime_ns):
        return f"its file {record.file} has {found.st_size} bytes and another time than when it was written"
    return None if record.offset <= found.st_size else f"it begins at {record.offset}, behind the end of its file"


# -- vocabularies -----------------------------------------------------------------------------------------------------


def _vocabulary_sizes(subject: Subject) -> str | None:
    arrays = (subject.record.ids, *subject.record.permutations)
    return next((wrong for array in arrays if (wrong := _whole(array, 4, "its ids and rows"))), None)


def _vocabulary_ids(subject: Subject) -> str | None:
    record = subject.record
    ids = np.frombuffer(record.ids, dtype="<i4").astype(np.int64)
    if (np.diff(ids) <= 0).any() or (ids < 0).any():
        return "its ids do not ascend from 0"
    if record.count < ids.size:
        return f"it counts {record.count} tokens and has {ids.size} ids"
    named = (*record.token_ids, *record.found_ids)
    return f"it names id {min(named)}" if named and min(named) < -1 else None


def _vocabulary_rows(subject: Subject) -> str | None:
    rows = [np.frombuffer(packed, dtype="<i4") for packed in subject.record.permutations]
    return "a row is below -1" if any((row < -1).any() for row in rows) else None


def _vocabulary_files(subject: Subject) -> str | None:
    for name in subject.record.files:
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"its file {name!r} lies outside of the model's directory"
    return None


# -- plans ------------------------------------------------------------------------------------------------------------


def _plan_key(subject: Subject) -> str | None:
    found = subject.record.plan_id
    if not _is_plan_id(found):
        return f"its id {found!r} is none"
    return None if subject.key == found.encode() else f"it is the plan {found}, kept under another id"


def _plan_numbers(subject: Subject) -> str | None:
    record = subject.record
    planned, total, budget = record.expert_bytes_planned, record.expert_bytes_total, record.budget_bytes
    if not 0 <= planned <= total:
        return f"it plans to read {planned} of {total} bytes of experts"
    if budget is not None and planned > budget:
        return f"it plans to read {planned} bytes of experts, above its budget of {budget}"
    if record.max_shard_size <= 0 or record.created_ns <= 0:
        return f"its largest file has {record.max_shard_size} bytes, and it was made at {record.created_ns}"
    return None


def _plan_texts(subject: Subject) -> str | None:
    record = subject.record
    roles = {entry.role for entry in record.inputs}
    if not record.recipe or not record.method or not record.inputs:
        return "it lacks its recipe, its method or its inputs"
    return None if roles <= {"base", "expert"} else f"its inputs are {', '.join(sorted(roles))}"


def _plan_identity(subject: Subject) -> str | None:
    record = subject.record
    local = any(entry.identity.startswith("local-") for entry in record.inputs)
    if record.plan_id.startswith("local-") != local:
        return "its id says otherwise than its inputs whether their contents are known"
    return None


def _plan_entries(subject: Subject) -> str | None:
    if subject.evidence.first_key("entries", subject.key + b"/") is None:
        return "it has no tensors"
    return None


def _plan_directories(subject: Subject) -> str | None:
    found = next((one for one in subject.record.directories if not one.startswith("/")), None)
    return None if found is None else f"relative paths count from {found!r}, which is relative, too"


def _entry_plan(subject: Subject) -> str | None:
    plan_id = subject.key.partition(b"/")[0]
    if not subject.evidence.has("plans", plan_id):
        return f"its plan {plan_id.decode(errors='replace')} is not there"
    return None


def _entry_key(subject: Subject) -> str | None:
    plan_id = subject.key.partition(b"/")[0].decode(errors="replace")
    if subject.key != key_of_entry(plan_id, subject.record.name):
        return f"it is the tensor {subject.record.name!r}, kept under the name of another"
    return None


def _entry_shape(subject: Subject) -> str | None:
    record = subject.record
    if record.dtype not in DTYPES or any(size < 0 for size in record.shape):
        return f"its dtype is {record.dtype!r} and its shape {list(record.shape)}"
    return None


def _entry_selection(subject: Subject) -> str | None:
    chosen, grid = subject.record.selection, BlockGrid.of(subject.record.shape)
    if chosen is None:
        return None
    if chosen.cell <= 0 or (grid.step and grid.step % chosen.cell):
        return f"its cells have {chosen.cell} elements, and its blocks {grid.step}"
    cells, inputs = math.ceil(grid.size / chosen.cell), len(chosen.levels)
    try:
        levels = [len(zlib.decompress(row)) for row in chosen.levels]
        givers = np.frombuffer(zlib.decompress(chosen.givers), dtype="<i2")
    except (zlib.error, ValueError) as error:
        return f"what is read of it cannot be unpacked ({error})"
    if set(levels) - {cells} or givers.size != inputs * grid.count:
        return f"what is read of it is not said for {inputs} inputs, {cells} cells and {grid.count} blocks"
    if len(chosen.computed) != math.ceil(grid.count / 8):
        return f"which of its {grid.count} blocks are computed is said with {len(chosen.computed)} bytes"
    return _later_givers(givers.reshape(inputs, grid.count))


def _later_givers(givers: NDArray[Any]) -> str | None:
    for index, row in enumerate(givers):
        if ((row < 0) | (row > index)).any():
            return f"its input {index} has bytes of an input that comes later, or of none"
    return None


def _reading_key(subject: Subject) -> str | None:
    record = subject.record
    if subject.key != record.plan_id.encode():
        return f"it is of the plan {record.plan_id}, kept under another id"
    if record.how not in _WAYS or record.changed_ns <= 0:
        return f"it was read by {record.how!r}, at {record.changed_ns}"
    return None


def _reading_counts(subject: Subject) -> str | None:
    for name, counts in subject.record.counts.items():
        if len(counts) % 16 or (np.frombuffer(counts, dtype="<i8") < 0).any():
            return f"what was read of {name!r} is not two counts for each input"
    return None


def _reading_plan(subject: Subject) -> str | None:
    found = subject.evidence.has("plans", subject.key)
    return None if found else f"its plan {subject.record.plan_id} is not there"


# -- transactions -----------------------------------------------------------------------------------------------------


def _transaction_key(subject: Subject) -> str | None:
    found = subject.record.transaction_id
    return None if subject.key == found.encode() else f"it is the transaction {found}, kept under another id"


def _transaction_state(subject: Subject) -> str | None:
    record = subject.record
    if record.state not in _STATES:
        return f"its state is {record.state!r}"
    if record.pid <= 0 or record.changed_ns <= 0:
        return f"its process is {record.pid}, and it changed at {record.changed_ns}"
    return None


def _transaction_paths(subject: Subject) -> str | None:
    record = subject.record
    paths = (record.destination, record.staging)
    return next((f"its path {path!r} is not absolute" for path in paths if not path.startswith("/")), None)


def _transaction_plan(subject: Subject) -> str | None:
    plan_id = subject.record.plan_id
    return None if subject.evidence.has("plans", plan_id.encode()) else f"its plan {plan_id} is not there"


def _transaction_hashes(subject: Subject) -> str | None:
    record = subject.record
    if record.manifest and not _is_hexadecimal(record.manifest, 64):
        return f"the hash of its manifest {record.manifest!r} is none"
    if record.content and not _is_hexadecimal(record.content, _IDENTITY):
        return f"the identity of what it wrote {record.content!r} is none"
    if record.state in ("prepared", "committed") and not record.manifest:
        return f"it is {record.state}, and does not say what it wrote"
    return None


INVARIANTS: Final = (
    Invariant("C20", "checkpoints", "the key is a local identity, and the path is absolute", _checkpoint_names),
    Invariant("C21", "checkpoints", "no count is negative", _checkpoint_numbers),
    Invariant("C22", "checkpoints", "an identity by content has 48 hexadecimal digits", _checkpoint_content),
    Invariant("C23", "contents", "the digest has 24 bytes, and the hash of each block 32", _content_sizes),
    Invariant("C24", "contents", "tensors with the same digest have the same hashes of blocks", _content_alike),
    Invariant("C25", "deltas", "the arrays have an entry for each block that changed", _delta_sizes),
    Invariant(
        "C26",
        "deltas",
        "no number is negative or infinite, and each block said to have changed has",
        _delta_values,
    ),
    Invariant("C27", "norms", "they are whole numbers of 4 bytes, none negative or infinite", _norms),
    Invariant("C28", "twins", "the key of the tensor has 24 bytes", _twin),
    Invariant(
        "C29", "histograms", "bins ascend below 32,768, there is a count for each, and none is empty", _histogram
    ),
    Invariant("C30", "thresholds", "key and cut are what an element can have", _threshold_values),
    Invariant("C31", "vectors", "it is whole numbers of 8 bytes", _vector_sizes),
    Invariant("C32", "vocabularies", "ids and rows are whole numbers of 4 bytes", _vocabulary_sizes),
    Invariant("C33", "vocabularies", "ids ascend from 0, and there is a token for each", _vocabulary_ids),
    Invariant("C34", "vocabularies", "a row is one of a model, or -1", _vocabulary_rows),
    Invariant("C35", "vocabularies", "files lie in the model's directory", _vocabulary_files),
    Invariant("C36", "planes", "counts and sizes are what planes can have", _planes_numbers),
    Invariant("C37", "planes", "the arrays have an entry for each cell, and for each cell and level", _planes_sizes),
    Invariant("C38", "planes", "errors are not negative, and none rises with the level", _planes_values),
    Invariant("C39", "planes", "the file is there as it was written, by size and time", _planes_file),
    Invariant("C40", "plans", "the key is the plan's id", _plan_key),
    Invariant("C41", "plans", "what is read is within the budget, and sizes and times are positive", _plan_numbers),
    Invariant("C42", "plans", "there are a recipe, a method, and inputs, each the base or an expert", _plan_texts),
    Invariant("C43", "plans", "the id is local exactly while the identity of an input is", _plan_identity),
    Invariant("C44", "plans", "it has tensors", _plan_entries),
    Invariant("C49", "plans", "the directories that relative paths count from are absolute", _plan_directories),
    Invariant("C45", "entries", "the plan is there", _entry_plan),
    Invariant("C46", "entries", "the key is that of the tensor's name", _entry_key),
    Invariant("C47", "entries", "dtype and shape are those of a tensor", _entry_shape),
    Invariant("C48", "entries", "what is read fits the shape and the inputs", _entry_selection),
    Invariant("C50", "readings", "the key is the plan's id, and how and when it was read can be", _reading_key),
    Invariant("C51", "readings", "there are two counts for each input, none negative", _reading_counts),
    Invariant("C52", "readings", "the plan is there", _reading_plan),
    Invariant("C60", "transactions", "the key is the transaction's id", _transaction_key),
    Invariant("C61", "transactions", "state, process and time are what a run can have", _transaction_state),
    Invariant("C62", "transactions", "its paths are absolute", _transaction_paths),
    Invariant("C63", "transactions", "its plan is there", _transaction_plan),
    Invariant("C64", "transactions", "hashes of what was written are there once it is prepared", _transaction_hashes),
)
"""By table, in the order in which they are asked: nothing more is asked of a record that breaks one."""
