"""What a tensor is called in the catalog: by its content once that is known, before that by its file."""

import struct
from collections.abc import Sequence

from blake3 import blake3

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.checkpoint import Checkpoint
from mergefs.statistics.pair import Location

KEY_BYTES = 24


def digest(*parts: bytes | str | int) -> bytes:
    """Return a hash of ``parts`` that depends on each of them and on where one ends."""
    hasher = blake3()
    for part in parts:
        data = str(part).encode() if isinstance(part, (int, str)) else part
        hasher.update(struct.pack("<Q", len(data)))
        hasher.update(data)
    return hasher.digest(length=KEY_BYTES)


def local_key(location: Location) -> bytes:
    """Return the key of a tensor by the file that it lies in: header, size, times and inode."""
    shard = location.checkpoint.shards[location.tensor.shard]
    found = shard.fingerprint
    return digest(
        "local", shard.header.digest, found.size, found.mtime_ns, found.ctime_ns, found.inode, location.tensor.name
    )


def tensor_keys(location: Location, catalog: Catalog) -> tuple[bytes, ...]:
    """Return the keys that statistics of this tensor may be kept under, the best first."""
    local = local_key(location)
    content = catalog.content(local)
    return (local,) if content is None else (content.digest, local)


def content_identity(tensors: Sequence[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Return the identity of a checkpoint from (name, dtype, shape, content digest) of every tensor.

    It does not depend on shards, paths or file times.
    """
    parts: list[bytes | str | int] = []
    for name, dtype, shape, content in sorted(tensors):
        parts += [name, dtype, ",".join(map(str, shape)), content]
    return digest(*parts).hex()


def checkpoint_identity(checkpoint: Checkpoint, catalog: Catalog) -> str:
    """Return the content identity of ``checkpoint`` where every tensor has been hashed, else the local one."""
    known: list[tuple[str, str, tuple[int, ...], bytes]] = []
    recorded = catalog.checkpoint(checkpoint.local_identity)
    if recorded is not None and recorded.content is not None:
        return recorded.content
    for tensor in checkpoint.tensors.values():
        content = catalog.content(local_key(Location(checkpoint, tensor)))
        if content is None:
            return checkpoint.local_identity
        known.append((tensor.name, tensor.dtype.name, tensor.shape, content.digest))
    return content_identity(known)
