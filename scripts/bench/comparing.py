"""Compares what mergefs and mergekit wrote, element by element, within what docs/parity.md states.

Methods that mergekit leaves nothing open in must give the same bits. Where one rule differs on purpose, each element
that differs is held against that rule; where masks are drawn at random, what they do on the whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.families import Family
from bench.recipes import DENSITY
from bench.results import Checked

UNITS: Final[Mapping[str, int]] = {"slerp": 3, "model_stock": 3}
"""In units in the last place, how far angles that torch sums up on several threads in BF16 can take an element."""

_SELECTING: Final = frozenset({"ties"})
_RANDOM: Final = frozenset({"dare_ties", "della"})
_CHUNK: Final = 2**20
"""Elements that are looked at together, so that they stay in a cache."""

_ALIKE: Final = 0.02
"""By what share masks from two generators, and a factor rounded to BF16 or not, may change the sum of a delta."""

Array = NDArray[Any]


class Weights:
    """The BF16 tensors of a model directory by name, as the 16 bits of each element; files are mapped."""

    def __init__(self, directory: Path) -> None:
        from mergefs.checkpoint.header import read_header

        self._tensors: dict[str, Array] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with path.open("rb") as file:
                header = read_header(file.fileno(), path)
            data = np.memmap(path, dtype=np.uint8, mode="r")
            for entry in header.tensors:
                if entry.dtype.name != "BF16":
                    raise ValueError(f"{path}: {entry.name} is {entry.dtype.name}, and BF16 is compared here")
                self._tensors[entry.name] = data[entry.begin : entry.end].view(np.uint16)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return sorted(self._tensors)

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]


@dataclass(frozen=True, slots=True)
class _Difference:
    """Elements that differ, in one tensor: where, and what they are in both models."""

    name: str
    size: int
    where: Array
    ours: Array
    theirs: Array


def _differences(ours: Weights, theirs: Weights) -> Iterator[_Difference]:
    """Yield for each tensor what differs in it."""
    for name in ours.names():
        our, their = ours[name], theirs[name]
        where = np.flatnonzero(our != their)
        yield _Difference(name, our.size, where, our[where], their[where])


def same_bits(first: Path, second: Path) -> Checked:
    """Hold the weights of two directories against each other, bit for bit."""
    ours, theirs = Weights(first), Weights(second)
    if ours.names() != theirs.names():
        return Checked(False, f"{first.name} and {second.name} have different tensors")
    found = list(_differences(ours, theirs))
    differing, elements = sum(len(one.where) for one in found), sum(one.size for one in found)
    if differing:
        return Checked(False, f"{first.name} and {second.name} differ in {differing:,} of {elements:,} elements")
    return Checked(True, f"all {elements:,} elements are the same bits")


def same_merge(method: str, family: Family, ours: Path, theirs: Path) -> Checked:
    """Hold what mergefs wrote against what mergekit wrote of the same recipe, as far as is promised of the method."""
    our, their = Weights(ours), Weights(theirs)
    if our.names() != their.names():
        return Checked(False, "mergefs and mergekit wrote different tensors")
    if method in _SELECTING:
        return _same_but_for_equal_magnitudes(family, our, their)
    if method in _RANDOM:
        return _same_on_average(family, our, their)
    if method in UNITS:
        return _same_but_for_rounding(family, our, their, UNITS[method])
    return same_bits(ours, theirs)


def _same_but_for_equal_magnitudes(family: Family, ours: Weights, theirs: Weights) -> Checked:
    """Allow a difference only where an expert's delta has just the magnitude that a density ends at."""
    base, experts = Weights(family.base), [Weights(path) for path in family.experts]
    differing = elements = unexplained = 0
    for found in _differences(ours, theirs):
        elements += found.size
        differing += len(found.where)
        if len(found.where):
            open_to_chance = np.zeros(len(found.where), dtype=np.bool_)
            for expert in experts:
                least = _least_magnitude_kept(base[found.name], expert[found.name])
                if least:  # of zeros it makes no difference which are kept
                    values = base[found.name][found.where], expert[found.name][found.where]
                    open_to_chance |= _magnitudes(*values) == least
            unexplained += int((~open_to_chance).sum())
    if unexplained:
        return Checked(False, f"{unexplained:,} of {elements:,} elements differ, and no equal magnitudes explain it")
    return Checked(
        True,
        f"the same bits but for {differing / elements:.2%} of {elements:,} elements, where an expert's delta has "
        "just the magnitude that its density ends at: which of these survive is open in mergekit, whose sort is not "
        "stable",
    )


def _same_but_for_rounding(family: Family, ours: Weights, theirs: Weights, units: int) -> Checked:
    """Allow differences of some units in the last place, of the largest of inputs and results."""
    inputs = [Weights(path) for path in (family.base, *family.experts)]
    differing = elements = 0
    largest = 0.0
    for found in _differences(ours, theirs):
        elements += found.size
        differing += len(found.where)
        if len(found.where):
            values = [_numbers(found.ours), _numbers(found.theirs)]
            sizes = [*values, *(_numbers(model[found.name][found.where]) for model in inputs)]
            unit = np.exp2(np.floor(np.log2(np.abs(sizes).max(axis=0))) - 7)
            largest = max(largest, float((np.abs(values[0] - values[1]) / unit).max()))
    said = f"{differing / elements:.2%} of {elements:,} elements differ, by at most {largest:g} units in the last place"
    return Checked(largest <= units, f"{said} (allowed: {units}, for sums that torch splits between threads)")


def _same_on_average(family: Family, ours: Weights, theirs: Weights) -> Checked:
    """Compare the share of elements that the merge changed, and the sum of the magnitudes of its delta."""
    base = Weights(family.base)
    changed, sums = np.zeros(2), np.zeros(2)
    elements = 0
    for name in ours.names():
        elements += base[name].size
        for number, model in enumerate((ours, theirs)):
            delta = np.abs(_numbers(model[name]) - _numbers(base[name]))
            changed[number] += np.count_nonzero(delta)
            sums[number] += delta.sum(dtype=np.float64)
    apart = max(abs(pair[0] / pair[1] - 1) for pair in (changed, sums))
    return Checked(
        bool(apart <= _ALIKE),
        f"masks come from another generator: of {elements:,} elements {changed[0] / elements:.1%} changed, by mergekit "
        f"{changed[1] / elements:.1%}, and the magnitudes of the delta add up to {sums[0] / sums[1]:.4f} of mergekit's "
        f"(allowed: {_ALIKE:.0%} apart)",
    )


def _numbers(bits: Array) -> Array:
    """Return the float32 numbers that BF16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _magnitudes(base: Array, expert: Array) -> Array:
    """Return the magnitudes of a delta in BF16, as the 15 bits of each: they sort as the numbers do."""
    # Of finite numbers: float32 holds what BF16 does, and the difference is rounded once, to even, to BF16.
    bits = (_numbers(expert) - _numbers(base)).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0x7FFF


def _least_magnitude_kept(base: Array, expert: Array) -> int:
    """Return the smallest magnitude of a delta that its density keeps some of."""
    counts = np.zeros(2**15, dtype=np.int64)
    for first in range(0, len(base), _CHUNK):
        part = slice(first, first + _CHUNK)
        counts += np.bincount(_magnitudes(base[part], expert[part]), minlength=2**15)
    kept = np.cumsum(counts[::-1])
    return int(2**15 - 1 - np.searchsorted(kept, int(DENSITY * len(base))))
