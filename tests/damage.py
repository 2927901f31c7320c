"""Damage that the file system does not tell of: bits that flip while size and time of the last change stay."""

import os
from pathlib import Path


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file; whoever has it open sees the same size and the same time of change as before."""
    status = path.stat()
    descriptor = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, bit // 8)[0] ^ (1 << bit % 8)
        assert os.pwrite(descriptor, bytes([byte]), bit // 8) == 1
    finally:
        os.close(descriptor)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
