"""Which bytes of a merged tensor are those of a tensor in a file, as they lie there: nothing of them is computed.

Who writes the merged model may let the file system share them, instead of writing them again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.levels import WHOLE, Selection
from mergefs.planner.plan import TensorPlan
from mergefs.sources.place import Place, StoredTensor

SMALLEST: Final = 64 * 1024
"""Bytes that are worth being shared: below that a file of many pieces costs more than writing them does."""

_COMPUTED: Final = 0
_STOOD_IN: Final = 1
_TAKEN: Final = 2


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes ``begin`` to ``end`` of a merged tensor, which are the same bytes of the tensor ``source``."""

    begin: int
    end: int
    source: StoredTensor


def copies(tensor: TensorPlan) -> Iterator[Copy]:
    """Yield what is copied of a tensor, in its order: whole blocks, side by side ones of one source as one."""
    selection = tensor.selection
    if selection is None or tensor.context is None:
        taken = _taken(tensor)
        if taken is not None and tensor.nbytes:
            yield Copy(0, tensor.nbytes, taken)
        return
    origins = _origins(tensor, selection)
    changes = np.flatnonzero(np.diff(origins, prepend=-1)).tolist()
    step = tensor.grid.step * tensor.dtype.itemsize
    for first, last in zip(changes, [*changes[1:], origins.size], strict=True):
        source = (None, _stand_in(tensor), _taken(tensor))[int(origins[first])]
        if source is not None:
            yield Copy(first * step, min(last * step, tensor.nbytes), source)


def asked_copies(tensor: TensorPlan) -> Iterator[Copy]:
    """Yield what is copied of a tensor by what is asked, whatever the catalog knows of its inputs beside that.

    A merge without a budget reads blocks from the base that are known to be the same there, too.
    """
    selection = tensor.selection
    yield from copies(tensor if selection is None or not selection.complete else replace(tensor, selection=None))


def source_of_copies(tensor: TensorPlan) -> StoredTensor | None:
    """Return the tensor in a file that blocks of a tensor are, or would be, copied from; None where there is none."""
    return _taken(tensor) if tensor.context is None else _stand_in(tensor) or _taken(tensor)


def _origins(tensor: TensorPlan, selection: Selection) -> NDArray[np.int8]:
    """Return of each block where it is from."""
    origins = np.where(selection.computed, _COMPUTED, _STOOD_IN).astype(np.int8)
    index = _index_of_taken(tensor)
    if index is not None and _taken(tensor) is not None:
        whole = selection.levels[index] == WHOLE
        first = np.arange(0, whole.size, selection.grid.step // selection.cell)
        all_whole = np.logical_and.reduceat(whole, first) if first.size else whole
        origins[all_whole & selection.computed & (selection.givers[index] == index)] = _TAKEN
    return origins


def _index_of_taken(tensor: TensorPlan) -> int | None:
    """Return the input that the method takes as it is, None where it computes."""
    if tensor.method is None or tensor.context is None:
        return 0
    return tensor.method.taken_as_it_is(tensor.context)


def _taken(tensor: TensorPlan) -> StoredTensor | None:
    """Return the input that is taken as it is, where the bytes of its file are."""
    index = _index_of_taken(tensor)
    return None if index is None else _same_bytes(tensor, tensor.places[index])


def _stand_in(tensor: TensorPlan) -> StoredTensor | None:
    """Return what stands in for what is not bought, where the bytes of its file do."""
    return None if tensor.stand_in is None else _same_bytes(tensor, tensor.stand_in)


def _same_bytes(tensor: TensorPlan, place: Place) -> StoredTensor | None:
    """Return a place whose bytes are not converted on their way, None for any other."""
    if isinstance(place, StoredTensor) and place.dtype == tensor.compute == tensor.dtype:
        return place
    return None
