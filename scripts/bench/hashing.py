"""Reads files side by side and hashes what it reads, in some processes that share nothing; a program of its own.

usage: python hashing.py PROCESSES FILE..., which prints the seconds from when all of them are ready, and the bytes.
"""

import json
import multiprocessing
import os
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from blake3 import blake3

CHUNK = 2**20


def hash_part(number: int, processes: int, paths: list[str], ready: Barrier) -> None:
    """Read and hash one of so many parts of all files, a piece of each by turns as a merge does."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    buffers = [np.ones(CHUNK, dtype=np.uint8) for _ in paths]
    parts = [os.fstat(descriptor).st_size // processes for descriptor in descriptors]
    ready.wait()
    for position in range(0, max(parts), CHUNK):
        for descriptor, buffer, part in zip(descriptors, buffers, parts, strict=True):
            piece = buffer[: max(part - position, 0)]
            if piece.size:
                os.preadv(descriptor, [piece], number * part + position)
                blake3(piece.data).digest()
    ready.wait()


def main() -> None:
    """Read and hash, and print seconds and bytes as JSON."""
    processes, paths = int(sys.argv[1]), sys.argv[2:]
    ready = multiprocessing.Barrier(processes + 1)
    parts = [
        multiprocessing.Process(target=hash_part, args=(number, processes, paths, ready)) for number in range(processes)
    ]
    for part in parts:
        part.start()
    ready.wait()
    started = time.perf_counter()
    ready.wait()
    seconds = time.perf_counter() - started
    for part in parts:
        part.join()
    print(json.dumps({"seconds": seconds, "bytes": sum(Path(path).stat().st_size for path in paths)}))


if __name__ == "__main__":
    main()
