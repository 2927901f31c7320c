"""Files that commands write for people: whole, or not at all."""

import os
from pathlib import Path

from mergefs.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step, so that what was there stays until all is written.

    Raises OutputError naming the path.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a directory; give the name of a file")
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
