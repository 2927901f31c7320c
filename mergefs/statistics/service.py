"""Answers the statistics that a method asks for: from the catalog, or by gathering them once, however many wait."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import HistogramRecord, ThresholdRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.methods.contract import (
    Answer,
    Answers,
    ElementSum,
    MagnitudeRescale,
    MagnitudeThreshold,
    Method,
    Statistic,
    TensorContext,
    Threshold,
)
from mergefs.methods.plugins import Origin
from mergefs.methods.registry import method_origin
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader
from mergefs.statistics import thresholds
from mergefs.statistics.element_sums import element_sums
from mergefs.statistics.identity import digest, tensor_keys
from mergefs.statistics.pair import TensorPair


class StatisticsService:
    """Looks statistics up and gathers what is missing."""

    def __init__(self, catalog: Catalog, reader: SourceReader) -> None:
        self._catalog = catalog
        self._reader = reader
        self._lock = threading.RLock()  # an input may itself be a merge that needs statistics

    def all_answers(self, method: Method[Any], context: TensorContext, places: tuple[Place, ...]) -> Answers:
        """Return every statistic that ``method`` wants of one tensor, whose places in each input are ``places``."""
        origin = method_origin(method.specification.name)
        wanted = method.statistics(context)
        found: dict[Statistic, Answer] = {}
        while wanted:
            found |= self.answers(wanted, places, context.base, context.compute, origin).values
            wanted = method.further_statistics(context, Answers(found))
        return Answers(found)

    def answers(
        self,
        wanted: tuple[Statistic, ...],
        places: tuple[Place, ...],
        base: int | None,
        compute: DType,
        origin: Origin | None = None,
    ) -> Answers:
        """Return the answers to ``wanted``, those of one pass.

        ``origin`` is the package whose method asks, None for ours: what is called alike there is another quantity.
        Gathering is serialised: a pass keeps the disk and a core busy, and a second one for the same tensor would find
        the first one's answer.
        """
        with self._lock:
            found = self._gather(wanted, places, base, compute, origin)
            self._catalog.flush()
        return Answers(found)

    def _gather(
        self,
        wanted: tuple[Statistic, ...],
        places: tuple[Place, ...],
        base: int | None,
        compute: DType,
        origin: Origin | None,
    ) -> dict[Statistic, Answer]:
        """Return the answers to ``wanted``; all sums among them in one pass."""
        sums = tuple(statistic for statistic in wanted if isinstance(statistic, ElementSum))
        found = self._sums(sums, places, compute, origin)
        for statistic in wanted:
            if not isinstance(statistic, ElementSum):
                found[statistic] = self._answer(statistic, places, base, compute)
        return found

    def _sums(
        self, wanted: tuple[ElementSum, ...], places: tuple[Place, ...], compute: DType, origin: Origin | None
    ) -> dict[Statistic, Answer]:
        """Return sums from the catalog, and those that it lacks from one pass over the models that they look at."""
        found: dict[Statistic, Answer] = {}
        missing: dict[ElementSum, bytes] = {}
        for statistic in wanted:
            looked_at = tuple(places[model] for model in statistic.models)
            asking = () if origin is None else (str(origin),)
            argument = " ".join((*asking, statistic.name, *map(repr, statistic.arguments)))
            keys = self._keys("sum", looked_at, compute, argument)
            known = self._known_number(keys)
            if known is None:
                missing[statistic] = keys[0]
            else:
                found[statistic] = known
        if missing:
            totals = element_sums(tuple(missing), places, compute, self._reader)
            for (statistic, key), total in zip(missing.items(), totals, strict=True):
                self._catalog.keep_number(key, total)
                found[statistic] = total
        return found

    def _answer(
        self,
        statistic: MagnitudeThreshold | MagnitudeRescale,
        inputs: tuple[Place, ...],
        base: int | None,
        compute: DType,
    ) -> Answer:
        """Return one answer."""
        if base is None:
            raise ValueError("a delta needs a base")
        pair = TensorPair(inputs[statistic.model], inputs[base], compute, self._reader)
        limit = self._threshold(pair, statistic.keep)
        if isinstance(statistic, MagnitudeThreshold):
            return limit
        keys = self._keys("rescale", (pair.expert, pair.base), compute, f"{statistic.keep} {statistic.beyond}")
        known = self._known_number(keys)
        if known is not None:
            return known
        outliers = self._threshold(pair, statistic.beyond) if statistic.beyond else None
        value = thresholds.rescale_factor(pair, limit, outliers)
        self._catalog.keep_number(keys[0], value)
        return value

    def _keys(self, kind: str, places: tuple[Place, ...], compute: DType, argument: int | str) -> list[bytes]:
        """Return the keys that a statistic may be kept under, the best first."""
        options = [tensor_keys(place, self._catalog) for place in places]
        best = tuple(keys[0] for keys in options)
        local = tuple(keys[-1] for keys in options)
        return [digest(kind, compute.name, argument, *keys) for keys in dict.fromkeys((best, local))]

    def _known_number(self, keys: list[bytes]) -> float | None:
        """Return a number that the catalog has under one of ``keys``, or None."""
        return next((value for key in keys if (value := self._catalog.number(key)) is not None), None)

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
