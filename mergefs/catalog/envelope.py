"""What surrounds each record in the catalog: a seal that tells damage, the day it was kept, and what it is about.

A value is 8 bytes of blake3 over the table, the key and the rest, and then the envelope as msgpack. So a record that
lies under another key, or whose bytes have changed on the disk, is told from one that was kept there.
"""

import time
from typing import Final, Generic, TypeVar

import msgspec
from blake3 import blake3

RecordT = TypeVar("RecordT", bound=msgspec.Struct)

SEAL: Final = 8
"""Bytes of a seal."""
SOURCE: Final = 24
"""Bytes of the key of one tensor in ``Envelope.about``."""
_DAY: Final = 86_400


class Envelope(msgspec.Struct, Generic[RecordT], frozen=True, array_like=True):
    """A record with the day (since 1970) on which it was kept.

    ``about`` are the keys, ``SOURCE`` bytes each, of the tensors in files that a statistic was gathered from: the hash
    of a tensor's content where it was known, else its local key. It is empty for records that are about no tensor.
    """

    day: int
    about: bytes
    record: RecordT


class UnsealedError(ValueError):
    """A value that is not what was kept under its key."""


def today() -> int:
    """Return the number of days since 1970."""
    return int(time.time()) // _DAY


def seal(table: str, key: bytes, payload: bytes) -> bytes:
    """Return the hash that tells whether ``payload`` is what was kept under ``key`` of ``table``."""
    hasher = blake3(f"{table} {len(key)} ".encode())
    hasher.update(key)
    hasher.update(payload)
    return hasher.digest(length=SEAL)


def enclose(table: str, key: bytes, record: msgspec.Struct, about: bytes = b"", day: int | None = None) -> bytes:
    """Return the value that keeps ``record``, from ``day`` on (today, where it is left out)."""
    payload = msgspec.msgpack.encode(Envelope(today() if day is None else day, about, record))
    return seal(table, key, payload) + payload


def unseal(table: str, key: bytes, value: bytes) -> bytes:
    """Return the encoded envelope of a value. Raises UnsealedError when it is not what was kept under ``key``."""
    payload = value[SEAL:]
    if value[:SEAL] != seal(table, key, payload):
        raise UnsealedError("its bytes are not those that were kept under this key")
    return payload


def decode(payload: bytes, kind: type[RecordT]) -> Envelope[RecordT]:
    """Return an envelope with a record of ``kind``. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(payload, type=Envelope[kind])  # type: ignore[valid-type]
