"""The task-vector family in one pass: tiles that stay in the first-level cache, one sweep over them for each expert."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import aligned_bytes
from mergefs.kernels.fused.prefetching import request
from mergefs.kernels.fused.values import byte_at, loaded, magnitude_bits, narrowed, rounded, signed_like

KEEP_ALL: Final = 0
KEEP_LARGEST: Final = 1
KEEP_RANDOM: Final = 2
KEEP_MARKED: Final = 3
NO_OUTLIER: Final = 0x7FFFFFFF
"""The largest pattern of a magnitude. Only a NaN reaches it, and whether a NaN is dropped makes no difference."""


class Expert(NamedTuple):
    """How one expert enters."""

    address: np.uint64
    """Of the expert's bytes."""
    weight: float
    rescaled: bool
    """Whether ``rescale`` enters."""
    rescale: float
    mask: int = KEEP_ALL
    cut: int = 0
    """KEEP_LARGEST: from this flat index on, ``limit_after`` holds."""
    limit_before: int = 0
    """KEEP_LARGEST: float32 bits of the smallest magnitude that is kept before ``cut``."""
    limit_after: int = 0
    outlier_cut: int = 0
    """KEEP_LARGEST: from this flat index on, ``outlier_after`` holds."""
    outlier_before: int = NO_OUTLIER
    """KEEP_LARGEST: float32 bits of the smallest magnitude that is dropped as an outlier before ``outlier_cut``."""
    outlier_after: int = NO_OUTLIER
    key: int = 0
    """KEEP_RANDOM: of the stream."""
    limit: int = 0
    """KEEP_RANDOM: draws below it are kept."""
    marks: np.uint64 = np.uint64(0)
    """KEEP_MARKED: address of a byte for each element of the run, which is not 0 where it is kept."""


class Settings(NamedTuple):
    """What holds for the whole run."""

    base: np.uint64
    """Address of the base's bytes."""
    start: int
    """Flat index of the first element."""
    consensus: bool
    normalize: bool
    divisor: float
    """Of the sum, where there is no consensus."""
    scaled: bool
    """Whether ``scale`` enters."""
    scale: float


_EXPERT_TYPES = ("u8", "f4", "i8", "f4", "i8", "i8", "i8", "i8", "i8", "i8", "i8", "u8", "u8", "u8")
_SETTINGS_TYPES = ("u8", "i8", "i8", "i8", "f4", "i8", "f4")
_EXPERT: Final = np.dtype(list(zip(Expert._fields, _EXPERT_TYPES, strict=True)), align=True)
_SETTINGS: Final = np.dtype(list(zip(Settings._fields, _SETTINGS_TYPES, strict=True)), align=True)

TILE: Final = 1024
_REQUESTED = np.uint64(2 * TILE)
"""Elements that memory is asked for ahead of those that are merged."""
_PADDING: Final = 48
"""Three cache lines: rows that lay whole pages apart would fight for the same lines of the cache."""

_BASE, _TOTAL, _MIXED, _DIVISOR, _DELTAS = 0, 1, 2, 3, 4
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_ZERO = np.float32(0)
_ONE = np.float32(1)


@inlined
def _load(result: Any, address: Any, first: Any, count: Any, tile: Any) -> Any:
    """Load ``count`` elements into a tile."""
    for i in range(count):
        tile[i] = loaded(address, first + i, result)


@inlined
def _clear(tile: Any, count: Any) -> Any:
    """Fill a tile with zeros."""
    for i in range(count):
        tile[i] = _ZERO


@inlined
def _weigh(delta: Any, kept: Any, rescaled: Any, rescale: Any, weight: Any, result: Any) -> Any:
    """Return a delta masked, rescaled and weighed. Multiplying by 0 is what makes infinity NaN, as the formula does."""
    delta = delta * (_ONE if kept else _ZERO)
    if rescaled:
        delta = rounded(delta * rescale, result)
    return rounded(delta * weight, result)


@inlined
def _add_all(result: Any, expert: Any, first: Any, count: Any, base: Any, total: Any, deltas: Any) -> Any:
    """Add the weighted deltas of an expert that nothing is pruned from to ``total``."""
    address, rescaled, rescale, weight = expert.address, expert.rescaled != 0, expert.rescale, expert.weight
    for i in range(count):
        delta = rounded(loaded(address, first + i, result) - base[i], result)
        delta = _weigh(delta, True, rescaled, rescale, weight, result)
        deltas[i] = delta
        total[i] += delta


@inlined
def _add_band(
    result: Any,
    expert: Any,
    first: Any,
    bounds: Any,
    limits: Any,
    base: Any,
    total: Any,
    deltas: Any,
) -> Any:
    """Add the weighted deltas whose magnitude is within ``limits``, between ``bounds`` of the tile, to ``total``."""
    address, rescaled, rescale, weight = expert.address, expert.rescaled != 0, expert.rescale, expert.weight
    least, most = limits
    for i in range(bounds[0], bounds[1]):
        delta = rounded(loaded(address, first + i, result) - base[i], result)
        magnitude = magnitude_bits(delta)
        delta = _weigh(delta, (magnitude >= least) & (magnitude < most), rescaled, rescale, weight, result)
        deltas[i] = delta
        total[i] += delta


@inlined
def _add_largest(
    result: Any, expert: Any, start: Any, first: Any, count: Any, base: Any, total: Any, deltas: Any
) -> Any:
    """Add the weighted deltas of the largest magnitudes: the tile in up to three parts, each with its own limits."""
    cut, outlier_cut = _place(expert.cut, start, first, count), _place(expert.outlier_cut, start, first, count)
    before, after = np.int32(expert.limit_before), np.int32(expert.limit_after)
    outlier_before, outlier_after = np.int32(expert.outlier_before), np.int32(expert.outlier_after)
    nearer, farther = min(cut, outlier_cut), max(cut, outlier_cut)
    between = (after, outlier_before) if cut < outlier_cut else (before, outlier_after)
    _add_band(result, expert, first, (np.uint64(0), nearer), (before, outlier_before), base, total, deltas)
    _add_band(result, expert, first, (nearer, farther), between, base, total, deltas)
    _add_band(result, expert, first, (farther, count), (after, outlier_after), base, total, deltas)


@inlined
def _place(cut: Any, start: Any, first: Any, count: Any) -> Any:
    """Return where in a tile the flat index ``cut`` lies, its ends where it lies outside."""
    return np.uint64(min(max(cut - start - np.int64(first), 0), np.int64(count)))


@inlined
def _add_random(
    result: Any, expert: Any, first: Any, count: Any, start: Any, base: Any, total: Any, deltas: Any
) -> Any:
    """Add the weighted deltas that the draws of SplitMix64 keep to ``total``."""
    address, rescaled, rescale, weight = expert.address, expert.rescaled != 0, expert.rescale, expert.weight
    limit = expert.limit
    counter = expert.key + (start + first) * _GAMMA
    for i in range(count):
        counter += _GAMMA
        state = (counter ^ (counter >> np.uint64(30))) * _FIRST_FACTOR
        state = (state ^ (state >> np.uint64(27))) * _SECOND_FACTOR
        state = (state ^ (state >> np.uint64(31))) >> np.uint64(40)
        delta = rounded(loaded(address, first + i, result) - base[i], result)
        delta = _weigh(delta, state < limit, rescaled, rescale, weight, result)
        deltas[i] = delta
        total[i] += delta


@inlined
def _add_marked(result: Any, expert: Any, first: Any, count: Any, base: Any, total: Any, deltas: Any) -> Any:
    """Add the weighted deltas that are marked to ``total``."""
    address, rescaled, rescale, weight = expert.address, expert.rescaled != 0, expert.rescale, expert.weight
    marks = expert.marks
    for i in range(count):
        delta = rounded(loaded(address, first + i, result) - base[i], result)
        delta = _weigh(delta, byte_at(marks, first + i) != 0, rescaled, rescale, weight, result)
        deltas[i] = delta
        total[i] += delta


@inlined
def _add_expert(
    result: Any, expert: Any, start: Any, first: Any, count: Any, base: Any, total: Any, deltas: Any
) -> Any:
    """Add one expert's weighted deltas to ``total`` and leave them in ``deltas``."""
    if expert.mask == KEEP_LARGEST:
        _add_largest(result, expert, start, first, count, base, total, deltas)
    elif expert.mask == KEEP_RANDOM:
        _add_random(result, expert, first, count, np.uint64(start), base, total, deltas)
    elif expert.mask == KEEP_MARKED:
        _add_marked(result, expert, first, count, base, total, deltas)
    else:
        _add_all(result, expert, first, count, base, total, deltas)


@inlined
def _elect(count: Any, total: Any) -> Any:
    """Replace sums by their signs, 1 or -1.

    The sum of values of a 16 bit type is a multiple of the smallest of them, so rounding it would not change its sign.
    """
    for i in range(count):
        total[i] = _ONE if total[i] >= _ZERO else -_ONE


@inlined
def _add_agreeing(weight: Any, weighed: Any, count: Any, majority: Any, deltas: Any, mixed: Any, divisor: Any) -> Any:
    """Add the deltas whose sign is ``majority`` to ``mixed``, and their weights to ``divisor`` if ``weighed``."""
    nothing = weight * _ZERO
    for i in range(count):
        agrees = signed_like(deltas[i], majority[i]) > _ZERO
        mixed[i] += deltas[i] * (_ONE if agrees else _ZERO)
        if weighed:
            divisor[i] += weight if agrees else nothing


@inlined
def _finish(result: Any, settings: Any, first: Any, count: Any, mixed: Any, divisor: Any, base: Any) -> Any:
    """Divide, scale, add to the base and store."""
    normalize, elected, scaled = settings.normalize != 0, settings.consensus != 0, settings.scaled != 0
    fixed, scale = settings.divisor, settings.scale
    for i in range(count):
        value = rounded(mixed[i], result)
        if normalize:
            if elected:
                by = rounded(divisor[i], result)
                by = _ONE if by == _ZERO else by
            else:
                by = fixed
            value = rounded(value / by, result)
        if scaled:
            value = rounded(value * scale, result)
        result[first + i] = narrowed(rounded(base[i] + value, result), result)


def _task_vector(result: Any, settings: Any, experts: Any, buffers: Any) -> None:
    """Merge a whole run into ``result``."""
    setting = settings[0]
    base, total, mixed, divisor = buffers[_BASE], buffers[_TOTAL], buffers[_MIXED], buffers[_DIVISOR]
    size = np.uint64(result.size)
    consensus, normalize = setting.consensus != 0, setting.normalize != 0
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        request(result, setting.base, first + _REQUESTED, count)
        _load(result, setting.base, first, count, base)
        _clear(total, count)
        for k in range(experts.size):
            request(result, experts[k].address, first + _REQUESTED, count)
            _add_expert(result, experts[k], setting.start, first, count, base, total, buffers[_DELTAS + k])
        if consensus:
            _elect(count, total)
            _clear(mixed, count)
            _clear(divisor, count)
            for k in range(experts.size):
                _add_agreeing(experts[k].weight, normalize, count, total, buffers[_DELTAS + k], mixed, divisor)
            _finish(result, setting, first, count, mixed, divisor, base)
        else:
            _finish(result, setting, first, count, total, divisor, base)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.Record(_SETTINGS), 1, "C"),
        types.Array(types.Record(_EXPERT), 1, "C"),
        types.Array(types.float32, 2, "C"),
    )


KERNEL: Final = Kernel(_task_vector, _signature)


def merge(dtype: DType, result: NDArray[Any], settings: Settings, experts: Sequence[Expert]) -> None:
    """Merge a run of elements of ``dtype`` into ``result``, an array of the element type that stands for it."""
    rows, columns = _DELTAS + len(experts), TILE + _PADDING
    buffers = aligned_bytes(rows * columns * 4).view(np.float32).reshape(rows, columns)
    entries = np.array(experts, dtype=_EXPERT)
    KERNEL.compiled(dtype)(result, np.array([settings], dtype=_SETTINGS), entries, buffers)
