"""Weight files cut into the pieces that manifests tell the hashes of, from nothing but the files themselves."""

import json
from typing import Final

from blake3 import blake3

MIB: Final = 2**20
ELEMENTS: Final = 512 * 1024
ITEM_SIZES: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1}

Cut = tuple[int, int, str | None]
"""Where a piece begins and ends, and the tensor that it is of; None for the header."""


def cuts(content: bytes) -> list[Cut]:
    """Return the pieces of a weight file: whole rows of at most 512 Ki elements, and 1 MiB at a time of the header."""
    data = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:data])
    tensors.pop("__metadata__", None)
    found: list[Cut] = [(begin, min(begin + MIB, data), None) for begin in range(0, data, MIB)]
    for name, told in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (data + offset for offset in told["data_offsets"])
        row = told["shape"][-1] if told["shape"] else 1
        step = max(ELEMENTS // max(row, 1), 1) * max(row, 1) * ITEM_SIZES[told["dtype"]]
        found += [(start, min(start + step, end), name) for start in range(begin, end, step)]
    return found


def piece_at(content: bytes, byte: int) -> tuple[int, str | None]:
    """Return the number of the piece that has a byte, and the tensor that it is of."""
    return next((number, name) for number, (_, end, name) in enumerate(cuts(content)) if byte < end)


def piece_hashes(content: bytes) -> list[str]:
    """Return the hash in hex of each piece."""
    return [blake3(content[begin:end]).hexdigest() for begin, end, _ in cuts(content)]
