"""Answers the statistics that a method asks for: from the catalog, or by gathering them once, however many wait."""

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import HistogramRecord, ThresholdRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.methods.contract import (
    Answer,
    Answers,
    InnerProduct,
    MagnitudeRescale,
    MagnitudeThreshold,
    Statistic,
    Threshold,
)
from mergefs.sources.reader import SourceReader
from mergefs.statistics import thresholds
from mergefs.statistics.identity import digest, tensor_keys
from mergefs.statistics.inner_products import inner_product
from mergefs.statistics.pair import Location, TensorPair

ValueT = TypeVar("ValueT")


class StatisticsService:
    """Looks statistics up and gathers what is missing."""

    def __init__(self, catalog: Catalog, reader: SourceReader) -> None:
        self._catalog = catalog
        self._reader = reader
        self._lock = threading.Lock()

    def answers(
        self,
        wanted: tuple[Statistic, ...],
        inputs: tuple[Location, ...],
        base: int | None,
        compute: DType,
    ) -> Answers:
        """Return the answers to ``wanted`` for one tensor, whose places in each input are ``inputs``.

        Gathering is serialised: a pass keeps the disk and a core busy, and a second one for the same tensor would find
        the first one's answer.
        """
        if not wanted:
            return Answers({})
        with self._lock:
            found = {statistic: self._answer(statistic, inputs, base, compute) for statistic in wanted}
            self._catalog.flush()
        return Answers(found)

    def _answer(self, statistic: Statistic, inputs: tuple[Location, ...], base: int | None, compute: DType) -> Answer:
        """Return one answer."""
        if isinstance(statistic, InnerProduct):
            first, second = inputs[statistic.first], inputs[statistic.second]
            return self._number(
                "inner product",
                (first, second),
                compute,
                0,
                lambda: inner_product(first, second, compute, self._reader),
            )
        if base is None:
            raise ValueError("a delta needs a base")
        pair = TensorPair(inputs[statistic.model], inputs[base], compute, self._reader)
        limit = self._threshold(pair, statistic.keep)
        if isinstance(statistic, MagnitudeThreshold):
            return limit
        if isinstance(statistic, MagnitudeRescale):
            return self._number(
                "rescale",
                (pair.expert, pair.base),
                compute,
                statistic.keep,
                lambda: thresholds.rescale_factor(pair, limit),
            )
        raise TypeError(f"no way to gather {statistic!r}")

    def _keys(self, kind: str, places: tuple[Location, ...], compute: DType, argument: int) -> list[bytes]:
        """Return the keys that a statistic may be kept under, the best first."""
        options = [tensor_keys(place, self._catalog) for place in places]
        best = tuple(keys[0] for keys in options)
        local = tuple(keys[-1] for keys in options)
        return [digest(kind, compute.name, argument, *keys) for keys in dict.fromkeys((best, local))]

    def _number(
        self, kind: str, places: tuple[Location, ...], compute: DType, argument: int, gather: Callable[[], float]
    ) -> float:
        """Return a statistic that is one number."""
        keys = self._keys(kind, places, compute, argument)
        for key in keys:
            known = self._catalog.number(key)
            if known is not None:
                return known
        value = gather()
        self._catalog.keep_number(keys[0], value)
        return value

    def _threshold(self, pair: TensorPair, keep: int) -> Threshold:
        """Return the threshold of one expert's delta."""
        keys = self._keys("threshold", (pair.expert, pair.base), pair.compute, keep)
        for key in keys:
            record = self._catalog.threshold(key)
            if record is not None:
                return Threshold(record.key, record.cut)
        limit = thresholds.threshold(pair, self._histogram(pair), keep)
        self._catalog.keep_threshold(keys[0], ThresholdRecord(limit.key, limit.cut))
        return limit

    def _histogram(self, pair: TensorPair) -> NDArray[np.int64]:
        """Return the magnitude histogram of one expert's delta."""
        keys = self._keys("histogram", (pair.expert, pair.base), pair.compute, 0)
        for key in keys:
            record = self._catalog.histogram(key)
            if record is not None:
                counts: NDArray[np.int64] = np.zeros(thresholds.BINS, dtype=np.int64)
                counts[np.frombuffer(record.bins, dtype="<u2")] = np.frombuffer(record.counts, dtype="<u8")
                return counts
        counts = thresholds.magnitude_histogram(pair)
        filled = np.flatnonzero(counts)
        self._catalog.keep_histogram(
            keys[0], HistogramRecord(filled.astype("<u2").tobytes(), counts[filled].astype("<u8").tobytes())
        )
        return counts
