"""What each table of the catalog holds: one declaration for each, which opening, checking and the documentation use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from mergefs.catalog.records import (
    CheckpointRecord,
    ContentRecord,
    DeltaRecord,
    HistogramRecord,
    NormRecord,
    NumberRecord,
    PlanEntryRecord,
    PlanesRecord,
    PlanRecord,
    ReadingRecord,
    ThresholdRecord,
    TransactionRecord,
    TwinRecord,
    VectorRecord,
    VocabularyRecord,
)


@dataclass(frozen=True, slots=True)
class Table:
    """One table: its record type, what its keys are, and what each field of a record means, with its unit.

    ``key_bytes`` is the length of a key, None where it varies. ``again`` says how what a record holds is had again;
    None for what nothing but the record knows.
    """

    record: type[msgspec.Struct]
    holds: str
    key: str
    fields: Mapping[str, str]
    again: str | None
    key_bytes: int | None = None


_GATHERED: Final = "it is gathered again when it is needed"
_STATISTIC: Final = "hash of the kind of statistic, its arguments, the compute dtype and the keys of the tensors"

SCHEMA: Final[Mapping[str, Table]] = {
    "checkpoints": Table(
        CheckpointRecord,
        holds="the models that have been seen",
        key="local identity of the directory: `local-` and 64 hexadecimal digits",
        fields={
            "path": "absolute path of the directory",
            "tensors": "number of tensors",
            "total_bytes": "bytes of their data",
            "content": "identity by content (48 hexadecimal digits), none before every tensor has been hashed",
        },
        again="it is written again when a recipe names the model",
    ),
    "contents": Table(
        ContentRecord,
        holds="hashes of tensors",
        key="local key of a tensor: hash of its file's header, size, times and inode, and of its name",
        fields={
            "digest": "hash of dtype, shape and the hashes of all blocks, 24 bytes",
            "blocks": "blake3 of each block, 32 bytes each",
        },
        again=_GATHERED,
        key_bytes=24,
    ),
    "deltas": Table(
        DeltaRecord,
        holds="block statistics of an expert's tensor against the base's",
        key=_STATISTIC,
        fields={
            "blocks": "number of blocks",
            "present": "packed bits of the blocks in which any element changed, which the arrays are about; empty: all",
            "changed": "elements of each block whose bits differ in the compute dtype, uint32",
            "squared_norms": "squared norm of each block's delta, float32",
            "absolute_sums": "sum of the magnitudes of each block's delta, float32",
            "largest": "largest magnitude of each block's delta, float32",
            "sketch_scales": "factor of each block's sketch, float32",
            "sketches": "sketch of each block's delta, 128 int8",
        },
        again=_GATHERED,
        key_bytes=24,
    ),
    "norms": Table(
        NormRecord,
        holds="squared norms of the blocks of tensors themselves",
        key=_STATISTIC,
        fields={"squared_norms": "squared norm of each block, float32"},
        again=_GATHERED,
        key_bytes=24,
    ),
    "twins": Table(
        TwinRecord,
        holds="which tensor had a certain block last where it first differs from its base",
        key="hash of the dtype, the content of the base, the number of the block and its hash",
        fields={"local": "local key of the tensor"},
        again=_GATHERED,
        key_bytes=24,
    ),
    "planes": Table(
        PlanesRecord,
        holds="where the delta planes of experts' tensors are",
        key="hash of the version of the code, the compute dtype and the keys of the expert's and the base's tensor",
        fields={
            "planes": "planes of each cell",
            "cell": "elements of a cell",
            "group": "elements that share a scale",
            "coded": "elements of each cell that have bits in the planes, uint32",
            "left": "squared error of each cell at every level from 0 on, rounded up, a row for each level, float32",
            "digest": "hash of the coded bytes and of all that they mean, 16 bytes",
            "file": "name of the file in the directory `planes` of the catalog",
            "file_size": "its size, bytes",
            "mtime_ns": "when it was written, nanoseconds since 1970",
            "offset": "where in it the first cell is, bytes",
        },
        again="it is coded again by `mergefs analyze --planes`",
        key_bytes=24,
    ),
    "histograms": Table(
        HistogramRecord,
        holds="histograms of the magnitudes of deltas",
        key=_STATISTIC,
        fields={
            "packed": "number of bins that are not empty, gaps between them, elements in each; seven bits of a number "
            "in each byte, the lowest first, the highest bit set where more follow; zlib",
        },
        again=_GATHERED,
        key_bytes=24,
    ),
    "thresholds": Table(
        ThresholdRecord,
        holds="which elements survive a selection",
        key=_STATISTIC,
        fields={
            "key": "elements with keys above it survive (a key is a magnitude's bit pattern)",
            "cut": "of those equal to `key`, the ones at flat indices below it survive",
        },
        again=_GATHERED,
        key_bytes=24,
    ),
    "numbers": Table(
        NumberRecord,
        holds="statistics that are one number",
        key=_STATISTIC,
        fields={"value": "float64; it may be NaN"},
        again=_GATHERED,
        key_bytes=24,
    ),
    "vectors": Table(
        VectorRecord,
        holds="statistics that are several numbers",
        key=_STATISTIC,
        fields={"values": "float64"},
        again=_GATHERED,
        key_bytes=24,
    ),
    "vocabularies": Table(
        VocabularyRecord,
        holds="merged vocabularies, with the files of their tokenizers",
        key="hash of the tokenizer files, the settings and the versions of the libraries",
        fields={
            "ids": "ids that tokens have, ascending, int32",
            "count": "number of tokens",
            "token_ids": "ids of the tokens that the recipe names",
            "found_ids": "ids of tokens looked up in single models, -1 where there is none",
            "permutations": "for each model its row of every id, -1 where it has none, int32",
            "files": "content of each file of the tokenizer, by name",
            "notes": "what is worth telling",
        },
        again="it is built again when a recipe needs it",
        key_bytes=32,
    ),
    "plans": Table(
        PlanRecord,
        holds="plans: what is needed to make each again, and to say what it was",
        key="plan id",
        fields={
            "plan_id": "32 hexadecimal digits, 16 for what is asked and 16 for what the inputs hold, after `local-` "
            "while an input has no identity by content",
            "recipe": "text of the recipe",
            "origin": "file of the recipe",
            "method": "merge method",
            "budget_bytes": "bytes of experts that may be read, none without a budget",
            "expert_bytes_total": "bytes of experts that reading all would take",
            "expert_bytes_planned": "bytes of experts that are planned to be read",
            "random_seed": "seed of random masks",
            "max_shard_size": "largest size of a merged file, bytes",
            "inputs": "models: reference, path, role (`base` or `expert`), identity, local identity",
            "created_ns": "when it was made, nanoseconds since 1970",
            "directories": "absolute directories that relative paths of the recipe count from, the first before the "
            "others",
            "options": "options that it was made with, by name",
            "outcome": "what it costs and what it leaves out, by name; bytes, and errors relative to the merged delta",
            "made_by": "version of mergefs, format of ids, hash of what the inputs' files are; package of the method "
            "and hash of the merged tokenizer, where there are",
        },
        again="it is made again when its recipe is planned",
    ),
    "entries": Table(
        PlanEntryRecord,
        holds="the tensors of plans",
        key="plan id, `/`, and the name of the tensor (of a name above 300 bytes the first 200 and its hash)",
        fields={
            "name": "name of the merged tensor",
            "dtype": "its dtype",
            "shape": "its shape",
            "selection": "what is read of each input, none where that is everything: elements of a cell; for each "
            "input the level of each cell (uint8, zlib); the input whose bytes each block takes (int16, zlib); packed "
            "bits of the blocks that are computed",
        },
        again="it is made again when the recipe of its plan is planned",
    ),
    "readings": Table(
        ReadingRecord,
        holds="what was really read of the experts of plans, the last time each",
        key="plan id",
        fields={
            "plan_id": "the key",
            "how": "`mount`, `materialize` or `open`",
            "changed_ns": "when it was written, nanoseconds since 1970",
            "counts": "for each tensor of which anything was read, by name: bytes read for the first time and again, "
            "of each input and then of what stands in, int64",
        },
        again="it is written again when the plan is read",
    ),
    "transactions": Table(
        TransactionRecord,
        holds="runs of `mergefs materialize`",
        key="transaction id: 32 hexadecimal digits",
        fields={
            "transaction_id": "the key",
            "plan_id": "the plan that is written",
            "destination": "absolute path of the model's directory",
            "staging": "absolute path of the directory that it is written in",
            "state": "`begun`; `prepared`, when all is written and only a rename is to follow; `committed`; `aborted`",
            "pid": "the process at work",
            "changed_ns": "when the state was written, nanoseconds since 1970",
            "manifest": "hash of the manifest of what was written (64 hexadecimal digits), empty before it is prepared",
            "content": "identity by content of what was written (48 hexadecimal digits), empty before it is prepared",
        },
        again=None,
    ),
}
"""The tables by name, in the order in which people are shown them."""

META: Final = "meta"
"""The table of the format stamp, whose values are plain text that every version can read."""

TABLES: Final = (META, *SCHEMA)
