"""Which keys a table of a recipe may have."""

from collections.abc import Callable, Mapping
from typing import Final

from mergefs.recipe.document import SequenceItem, TableItem, is_null
from mergefs.recipe.wording import nearest, quote, suggestion

_KEEPS_ANCHORS: Final = (".", "x-")


def check_keys(table: TableItem, known: tuple[str, ...], misplaced: Callable[[], Mapping[str, str]], what: str) -> None:
    """Refuse keys of ``table`` (``what`` it is, in words) that are not ``known``.

    ``misplaced`` returns, of keys that mergekit's users may expect here, why they cannot be used. Keys that start with
    a dot or with ``x-`` may have any value: that is where people keep what anchors name.
    """
    for entry in table:
        if entry.key in known or entry.key.startswith(_KEEPS_ANCHORS):
            continue
        elsewhere = misplaced()
        if entry.key in elsewhere:
            # mergekit writes keys that are not set as null or as empty lists.
            if not is_null(entry.value) and not (isinstance(entry.value, SequenceItem) and not entry.value.items):
                raise entry.place.error(f"{entry.key!r} cannot be used here: {elsewhere[entry.key]}")
            continue
        match = nearest(entry.key, known) or nearest(entry.key, elsewhere)
        hint = f"did you mean {match!r}?" if match else suggestion(entry.key, known)
        raise entry.place.error(f"{quote(entry.key)} is not a key of {what}; {hint}")
