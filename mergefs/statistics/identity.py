"""What a tensor is called in the catalog: by its content once that is known, before that by its file."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from blake3 import blake3

from mergefs.catalog.catalog import Catalog
from mergefs.checkpoint.checkpoint import TensorSource, WeightSource
from mergefs.checkpoint.dtypes import DType
from mergefs.checkpoint.source import Shard
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Place, StoredTensor

KEY_BYTES = 24
_LOCAL: Final = "local-"


def digest(*parts: bytes | str | int) -> bytes:
    """Return a hash of ``parts`` that depends on each of them and on where one ends."""
    joined: list[bytes] = []
    for part in parts:
        data = str(part).encode() if isinstance(part, (int, str)) else part
        joined += (len(data).to_bytes(8, "little"), data)
    return blake3(b"".join(joined)).digest(length=KEY_BYTES)


def local_key(place: Place) -> bytes:
    """Return the key of a tensor by the files that it comes from: header, size, times and inode."""
    if isinstance(place, StoredTensor):
        found = place.shard.fingerprint
        return _stored_key(
            place.shard.header.digest, found.size, found.mtime_ns, found.ctime_ns, found.inode, place.tensor.name
        )
    return digest("computed", place.formula, *map(local_key, place.parts))


@lru_cache(maxsize=1 << 15)
def _stored_key(header: bytes, size: int, mtime_ns: int, ctime_ns: int, inode: int, name: str) -> bytes:
    """Return the key of a tensor in a file; planning asks for that of each of thousands a dozen times."""
    return digest("local", header, size, mtime_ns, ctime_ns, inode, name)


def tensor_keys(place: Place, catalog: Catalog) -> tuple[bytes, ...]:
    """Return the keys that statistics of this tensor may be kept under, the best first."""
    local = local_key(place)
    content = catalog.content_digest(local)
    if content is not None:
        return (content, local)
    if isinstance(place, StoredTensor):
        return (local,)
    best = digest("computed", place.formula, *(tensor_keys(part, catalog)[0] for part in place.parts))
    return tuple(dict.fromkeys((best, local)))


def known_blocks(shard: Shard, tensor: TensorSource, catalog: Catalog) -> bytes | None:
    """Return the hashes of all blocks of a stored tensor (32 bytes each), None until it has been analysed."""
    content = catalog.content(local_key(StoredTensor(shard, tensor)))
    return None if content is None else content.blocks


def sources_of(catalog: Catalog, *places: Place) -> bytes:
    """Return the keys of the tensors in files that ``places`` are made of: what a statistic of them is about.

    Those are hashes of contents where they are known, else local keys.
    """
    stored = {tensor_keys(tensor, catalog)[0]: None for place in places for tensor in place.stored()}
    return b"".join(stored)


def statistic_keys(
    kind: str, places: Sequence[Place], compute: DType, argument: int | str, catalog: Catalog
) -> list[bytes]:
    """Return the keys that a statistic of ``places`` may be kept under, the best first."""
    return keys_among(kind, compute, argument, [tensor_keys(place, catalog) for place in places])


def keys_among(kind: str, compute: DType, argument: int | str, options: Sequence[tuple[bytes, ...]]) -> list[bytes]:
    """Return the keys that a statistic may be kept under of tensors that have these ``tensor_keys``, the best first."""
    best = tuple(keys[0] for keys in options)
    local = tuple(keys[-1] for keys in options)
    return [statistic_key(kind, compute, argument, keys) for keys in dict.fromkeys((best, local))]


def statistic_key(kind: str, compute: DType, argument: int | str, tensors: Sequence[bytes]) -> bytes:
    """Return the key of a statistic of tensors that have these keys themselves."""
    return digest(kind, compute.name, argument, *tensors)


def content_digest(dtype: DType, shape: tuple[int, ...], hashes: Sequence[bytes]) -> bytes:
    """Return what a tensor is known by: a hash of its dtype, its shape and the hashes of its blocks.

    These are the blocks of ``BlockGrid.of_contents``, whatever the tensor is computed by.
    """
    if len(hashes) != BlockGrid.of_contents(shape).count:
        raise ValueError(f"a tensor of shape {shape} has not {len(hashes)} blocks that it is known by")
    return digest("content", dtype.name, ",".join(map(str, shape)), b"".join(hashes))


def content_identity(tensors: Sequence[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Return the identity of a checkpoint from (name, dtype, shape, content digest) of every tensor.

    It does not depend on shards, paths or file times.
    """
    parts: list[bytes | str | int] = []
    for name, dtype, shape, content in sorted(tensors):
        parts += [name, dtype, ",".join(map(str, shape)), content]
    return digest(*parts).hex()


def structure_identity(source: WeightSource) -> str:
    """Return what the headers of a directory tell: a hash of name, dtype and shape of every tensor.

    It is the same on every machine, and does not depend on shards, paths, file times, or on what the tensors hold.
    """
    parts: list[bytes | str | int] = ["structure"]
    for name, tensor in sorted(source.tensors.items()):
        parts += [name, tensor.dtype.name, ",".join(map(str, tensor.shape))]
    return digest(*parts).hex()


def composed_identity(structure: str, parts: Sequence[str]) -> str:
    """Return the identity of what is computed, as ``structure`` says, from parts with these identities."""
    return _marked(digest(structure, *parts).hex(), parts)


def plan_id(asked: str, identities: Sequence[str]) -> str:
    """Return the id of a plan: what is asked (16 digits), and a hash of what its inputs hold (16 digits).

    It starts with ``local-`` while one of the ``identities`` of the inputs does.
    """
    return _marked(asked + digest("inputs", *identities)[: len(asked) // 2].hex(), identities)


def _marked(identity: str, parts: Sequence[str]) -> str:
    """Return an identity that is local where one of those that it is made of is."""
    return (_LOCAL if any(map(is_local, parts)) else "") + identity


def is_local(identity: str) -> bool:
    """Return whether an identity, or the id of a plan, holds on this machine only."""
    return identity.startswith(_LOCAL)


def checkpoint_identity(checkpoint: WeightSource, catalog: Catalog) -> str:
    """Return the content identity of ``checkpoint`` where every tensor has been hashed, else the local one."""
    known: list[tuple[str, str, tuple[int, ...], bytes]] = []
    recorded = catalog.checkpoint(checkpoint.local_identity)
    if recorded is not None and recorded.content is not None:
        return recorded.content
    for tensor in checkpoint.tensors.values():
        content = catalog.content_digest(local_key(StoredTensor(checkpoint.shards[tensor.shard], tensor)))
        if content is None:
            return checkpoint.local_identity
        known.append((tensor.name, tensor.dtype.name, tensor.shape, content))
    return content_identity(known)
