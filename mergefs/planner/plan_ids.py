"""What ids of plans look like. Imports nothing, since commands ask before they load anything."""

import re
from pathlib import Path
from typing import Final

SHORTEST_PREFIX: Final = 6
"""Digits that the beginning of an id must have, to be taken for one."""
_ID: Final = re.compile(rf"(local-)?[0-9a-f]{{{SHORTEST_PREFIX},32}}")


def names_plan(target: Path) -> bool:
    """Return whether ``target`` reads as the id of a plan, or the beginning of one, and is no file's name.

    Where there is a file (or a directory) of that name, the file is meant.
    """
    return reads_as_id(str(target)) and not target.exists()


def reads_as_id(text: str) -> bool:
    """Return whether ``text`` may be the id of a plan, or the beginning of one."""
    return _ID.fullmatch(text) is not None
