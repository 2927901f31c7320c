"""What must be true of every record of every table, whatever it holds."""

from typing import Final

import msgspec

from mergefs.catalog.check.evidence import ValueInvariant
from mergefs.catalog.envelope import SOURCE, Envelope, UnsealedError, decode, today, unseal
from mergefs.catalog.schema import SCHEMA


def _sealed(table: str, key: bytes, value: bytes) -> str | None:
    try:
        unseal(table, key, value)
    except UnsealedError as error:
        return str(error)
    return None


def _decodes(table: str, key: bytes, value: bytes) -> str | None:
    try:
        _envelope(table, key, value)
    except msgspec.DecodeError as error:
        return f"it is no {SCHEMA[table].record.__name__} ({error})"
    return None


def _key(table: str, key: bytes, value: bytes) -> str | None:
    length = SCHEMA[table].key_bytes
    if length is not None and len(key) != length:
        return f"its key has {len(key)} bytes, and those of table {table!r} have {length}"
    if length is None and not (key.isascii() or table == "entries"):
        return f"its key is no text, and those of table {table!r} are"
    return None


def _enclosed(table: str, key: bytes, value: bytes) -> str | None:
    envelope = _envelope(table, key, value)
    if len(envelope.about) % SOURCE:
        return f"the keys of tensors that it is about have {len(envelope.about)} bytes, no multiple of {SOURCE}"
    if not 0 <= envelope.day <= today() + 1:
        return f"it was kept on day {envelope.day} since 1970, which has not come"
    return None


def _envelope(table: str, key: bytes, value: bytes) -> Envelope[msgspec.Struct]:
    return decode(unseal(table, key, value), SCHEMA[table].record)


VALUE_INVARIANTS: Final = (
    ValueInvariant("C10", "its seal fits: the bytes are those that were kept, under this key of this table", _sealed),
    ValueInvariant("C11", "it decodes as the record type of its table", _decodes),
    ValueInvariant("C12", "its key has the form of its table's keys", _key),
    ValueInvariant("C13", "what it is about are whole keys, and the day that it was kept on has come", _enclosed),
)
"""In this order: what comes later is not asked of a value that breaks one."""
