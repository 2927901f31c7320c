"""The records of the catalog. Arrays are packed little-endian bytes; sizes are bytes unless said otherwise.

Fields are stored in order, without their names: new ones go to the end and have a default.
"""

from typing import Any

import msgspec


class ContentRecord(msgspec.Struct, frozen=True, array_like=True):
    """What the bytes of one tensor are: ``digest`` of all of them, and 32 bytes of blake3 for each block."""

    digest: bytes
    blocks: bytes


class DeltaRecord(msgspec.Struct, frozen=True, array_like=True):
    """An expert's tensor against the base's, block by block; see ``mergefs.statistics.blocks.BlockDeltas``.

    ``present`` has a bit for each of ``blocks`` blocks, set where any element changed (empty: in all of them). The
    arrays hold entries of these blocks alone: float32, but for ``changed`` (uint32) and ``sketches`` (128 int8 each).
    """

    blocks: int
    present: bytes
    changed: bytes
    squared_norms: bytes
    absolute_sums: bytes
    largest: bytes
    sketch_scales: bytes
    sketches: bytes


class NormRecord(msgspec.Struct, frozen=True, array_like=True):
    """The squared norm (float32) of each block of a tensor, in a compute dtype."""

    squared_norms: bytes


class PlanesRecord(msgspec.Struct, frozen=True, array_like=True):
    """The delta planes of an expert's tensor: a run of bytes from ``offset`` of a file in the catalog's directory.

    ``cell`` and ``group`` are elements, ``coded`` (uint32) says for each cell how many of its elements have bits,
    ``left`` (float32, a row for each level from 0 on) the squared error of each cell. ``digest`` is of the coded bytes
    and of all that decoding depends on.
    """

    planes: int
    cell: int
    group: int
    coded: bytes
    left: bytes
    digest: bytes
    file: str
    file_size: int
    mtime_ns: int
    offset: int


class HistogramRecord(msgspec.Struct, frozen=True, array_like=True):
    """How many magnitudes of a delta fall into each of 32,768 bins, packed by ``mergefs.statistics.histograms``."""

    packed: bytes


class TwinRecord(msgspec.Struct, frozen=True, array_like=True):
    """The local key of the last tensor that had a certain block where it first differs from its base."""

    local: bytes


class ThresholdRecord(msgspec.Struct, frozen=True, array_like=True):
    """See ``mergefs.methods.contract.Threshold``."""

    key: int
    cut: int


class NumberRecord(msgspec.Struct, frozen=True, array_like=True):
    """An answer that is one float64."""

    value: float


class VocabularyRecord(msgspec.Struct, frozen=True, array_like=True):
    """A merged vocabulary and the files of its tokenizer.

    ``ids`` (int32, ascending) are those that tokens have, ``count`` is the number of tokens, ``token_ids`` the ids of
    the tokens that the recipe names, ``found_ids`` those of tokens looked up in single models (-1 where there is none).
    ``permutations`` hold for each model the row (int32) of every id, -1 where it has none.
    """

    ids: bytes
    count: int
    token_ids: tuple[int, ...]
    found_ids: tuple[int, ...]
    permutations: tuple[bytes, ...]
    files: dict[str, bytes]
    notes: tuple[str, ...]


class VectorRecord(msgspec.Struct, frozen=True, array_like=True):
    """An answer that is several float64."""

    values: bytes


class CheckpointRecord(msgspec.Struct, frozen=True, array_like=True):
    """A model directory that has been seen, by its local identity; ``content`` once every tensor has been hashed."""

    path: str
    tensors: int
    total_bytes: int
    content: str | None


class InputRecord(msgspec.Struct, frozen=True, array_like=True):
    """One input of a plan."""

    reference: str
    path: str
    role: str
    identity: str
    local_identity: str


class PlanRecord(msgspec.Struct, frozen=True, array_like=True):
    """A plan: what is needed to make it again, and to say what it was.

    ``directories`` are those that relative paths of the recipe count from. ``options`` and ``outcome`` are the fields
    of ``PlanOptions`` and ``BudgetOutcome`` by name. ``made_by`` says what else the id follows from: the version of
    mergefs, the format of ids, the package that the method is from, what identifies a merged tokenizer, and a hash of
    what the inputs' files are (``files_identity``). Plans that were kept before these
    fields were have none of them, and cannot be made again.
    """

    plan_id: str
    recipe: str
    origin: str
    method: str
    budget_bytes: int | None
    expert_bytes_total: int
    expert_bytes_planned: int
    random_seed: int
    max_shard_size: int
    inputs: tuple[InputRecord, ...]
    created_ns: int
    directories: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    outcome: dict[str, Any] = {}
    made_by: dict[str, str] = {}


class SelectionRecord(msgspec.Struct, frozen=True, array_like=True):
    """See ``mergefs.planner.levels.Selection``: elements of a cell, and arrays.

    ``levels`` has for each input a row of uint8, ``givers`` all rows of int16, both compressed by zlib; ``computed``
    is packed bits.
    """

    cell: int
    levels: tuple[bytes, ...]
    givers: bytes
    computed: bytes


class PlanEntryRecord(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a plan: its dtype and shape, and what is read of each input (None: everything)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    selection: SelectionRecord | None


class ReadingRecord(msgspec.Struct, frozen=True, array_like=True):
    """What was really read of a plan's experts the last time: ``how`` is mount, materialize or open.

    ``counts`` hold for each tensor of which anything was read (inputs + 1) x 2 int64, by name: bytes read for the first
    time, and again, of each input and of what stands in for what is not bought.
    """

    plan_id: str
    how: str
    changed_ns: int
    counts: dict[str, bytes]


class TransactionRecord(msgspec.Struct, frozen=True, array_like=True):
    """One run of ``materialize``: state is begun, prepared, committed or aborted.

    ``manifest`` is the hash of the manifest of what was written, ``content`` the identity of the model; both are empty
    before it is prepared.
    """

    transaction_id: str
    plan_id: str
    destination: str
    staging: str
    state: str
    pid: int
    changed_ns: int
    manifest: str = ""
    content: str = ""
