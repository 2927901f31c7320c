"""How much of a file the kernel asks a mount for at once, for who reads on from one place to the next."""

import contextlib
from pathlib import Path
from typing import Final

KERNEL_WINDOW: Final = 2**20
"""Bytes that are asked for at once, in place of the kernel's 128 KiB: a request costs the server the same whatever its
size, and libfuse answers none that is larger."""

_DEVICES: Final = Path("/sys/class/bdi")


def widen(device: str, devices: Path = _DEVICES) -> None:
    """Let the kernel read ``KERNEL_WINDOW`` bytes ahead of readers of the mount that is ``device`` (major:minor).

    Only root may, and somebody may have asked for more: then all is left as it is.
    """
    window = devices / device / "read_ahead_kb"
    with contextlib.suppress(OSError, ValueError):
        if int(window.read_text()) * 1024 < KERNEL_WINDOW:
            window.write_text(str(KERNEL_WINDOW // 1024))
