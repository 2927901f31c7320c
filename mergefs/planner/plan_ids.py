"""What ids of plans look like, and which are meant. Imports nothing, since commands ask before they load anything.

An id has 32 hexadecimal digits, after ``local-`` while it holds on this machine only. The first 16 say what is asked:
they follow from the recipe, the options, the structure of the inputs and what is bought, and are the same on every
machine. The last 16 say what the inputs hold.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SHORTEST_PREFIX: Final = 6
"""Digits that the beginning of an id must have, to be taken for one."""
ASKED_DIGITS: Final = 16
"""Digits that say what is asked."""
PLAN_ID_ATTRIBUTE: Final = "user.mergefs.plan_id"
"""The extended attribute of what a mount shows that holds the id of its plan."""
_LOCAL: Final = "local-"
_ID: Final = re.compile(rf"({_LOCAL})?[0-9a-f]{{{SHORTEST_PREFIX},32}}")


def names_plan(target: Path) -> bool:
    """Return whether ``target`` reads as the id of a plan, or the beginning of one, and is no file's name.

    Where there is a file (or a directory) of that name, the file is meant.
    """
    return reads_as_id(str(target)) and not target.exists()


def reads_as_id(text: str) -> bool:
    """Return whether ``text`` may be the id of a plan, or the beginning of one."""
    return _ID.fullmatch(text) is not None


def asked(plan_id: str) -> str:
    """Return the half of an id that says what is asked."""
    return plan_id.removeprefix(_LOCAL)[:ASKED_DIGITS]


def meant_by(beginning: str, plan_ids: Iterable[str]) -> list[str]:
    """Return those of ``plan_ids`` that may be meant by ``beginning``, with or without ``local-``.

    An id that is given whole means itself. Of plans that ask the same, a single one that knows what its inputs hold is
    meant before all that know them by their files.
    """
    listed = list(plan_ids)
    if beginning in listed:
        return [beginning]
    found = [one for one in listed if one.startswith(beginning) or one.removeprefix(_LOCAL).startswith(beginning)]
    lasting = [one for one in found if not one.startswith(_LOCAL)]
    if len(lasting) == 1 and len(set(map(asked, found))) == 1:
        return lasting
    return found
