"""Checkpoints: safetensors headers (read, checked, written) and the model directories made of them."""

from mergefs.checkpoint.checkpoint import Checkpoint, TensorSource, open_checkpoint
from mergefs.checkpoint.dtypes import DTYPES, DType, promote
from mergefs.checkpoint.header import ShardHeader, TensorHeader, encode_header, read_header
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint, Shard

__all__ = [
    "Checkpoint",
    "TensorSource",
    "open_checkpoint",
    "Shard",
    "AuxiliaryFile",
    "Fingerprint",
    "ShardHeader",
    "TensorHeader",
    "read_header",
    "encode_header",
    "DType",
    "DTYPES",
    "promote",
]
