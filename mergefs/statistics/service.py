"""Answers the statistics that a method asks for: from the catalog, or by gathering them once, however many wait."""

import copy
import threading
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ThresholdRecord, VectorRecord
from mergefs.checkpoint.dtypes import F64, DType
from mergefs.kernels.precision import Raw, store
from mergefs.methods.contract import (
    Answer,
    Answers,
    ColumnSums,
    ElementNorms,
    ElementQuantile,
    ElementSums,
    ElementThreshold,
    MagnitudeRescale,
    MagnitudeThreshold,
    Method,
    Quantity,
    RowValues,
    SingleSums,
    Statistic,
    TensorContext,
    Threshold,
)
from mergefs.methods.plugins import Origin
from mergefs.methods.registry import method_origin
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader
from mergefs.statistics import thresholds
from mergefs.statistics.histograms import histogram_keys, known_histogram, pack
from mergefs.statistics.identity import digest, local_key, sources_of, statistic_keys, tensor_keys
from mergefs.statistics.pair import TensorPair
from mergefs.statistics.quantities import AboutQuantity, answer_quantities
from mergefs.statistics.row_means import mean_row
from mergefs.statistics.stream import TensorStream


class StatisticsService:
    """Looks statistics up and gathers what is missing.

    What is gathered is kept ``at_once``, or when whoever gathers a great deal flushes the catalog: each time takes the
    disk some milliseconds.
    """

    def __init__(self, catalog: Catalog, reader: SourceReader, at_once: bool = True) -> None:
        self._catalog = catalog
        self._at_once = at_once
        self._reader = reader
        self._lock = threading.Lock()
        self._gathering: defaultdict[bytes, threading.RLock] = defaultdict(threading.RLock)

    def reading_by(self, reader: SourceReader) -> "StatisticsService":
        """Return this service as one that reads by ``reader``, and whose caller flushes the catalog."""
        other = copy.copy(self)
        other._reader = reader
        other._at_once = False
        return other

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
        Who asks for the same tensor meanwhile waits, and finds the answers.
        """
        with self._pass_over(*places):
            found = self._gather(wanted, places, base, compute, origin)
            self._flush()
        return Answers(found)

    def mean_row(self, rows: Place) -> Raw:
        """Return the mean of all entries of the first dimension of a tensor, as bytes of its dtype."""
        with self._pass_over(rows):
            keys = [digest("mean row", key) for key in tensor_keys(rows, self._catalog)]
            known = next((record for key in keys if (record := self._catalog.vector(key)) is not None), None)
            if known is None:
                known = VectorRecord(mean_row(rows, self._reader).astype("<f8").tobytes())
                self._catalog.keep_vector(keys[0], known, sources_of(self._catalog, rows))
                self._flush()
        return store(np.frombuffer(known.values, dtype="<f8").astype(np.float64), F64, rows.dtype)

    def _flush(self) -> None:
        """Keep what was gathered, if that is to be done at once."""
        if self._at_once:
            self._catalog.flush()

    def _pass_over(self, *places: Place) -> threading.RLock:
        """Return the lock of who goes over these places; an input may itself be a merge that needs statistics."""
        with self._lock:
            return self._gathering[digest(*map(local_key, places))]

    def _gather(
        self,
        wanted: tuple[Statistic, ...],
        places: tuple[Place, ...],
        base: int | None,
        compute: DType,
        origin: Origin | None,
    ) -> dict[Statistic, Answer]:
        """Return the answers to ``wanted``; all sums among them in one pass."""
        quantities = tuple(one for one in wanted if isinstance(one, Quantity))
        found = self._quantities(quantities, TensorStream(places, compute, self._reader), origin)
        about_magnitudes = tuple(one for one in wanted if not isinstance(one, Quantity))
        return found | self._magnitudes(about_magnitudes, places, base, compute)

    def _quantities(
        self, wanted: tuple[AboutQuantity, ...], stream: TensorStream, origin: Origin | None
    ) -> dict[Statistic, Answer]:
        """Return what the catalog knows about quantities, and gather together what it lacks."""
        found: dict[Statistic, Answer] = {}
        missing: dict[AboutQuantity, bytes] = {}
        for statistic in wanted:
            looked_at = tuple(stream.places[model] for model in statistic.models)
            asking = () if origin is None else (str(origin),)
            argument = " ".join((*asking, statistic.name, *map(repr, statistic.arguments)))
            keys = self._keys(_kind(statistic), looked_at, stream.compute, argument)
            known = next((answer for key in keys if (answer := self._known(statistic, key)) is not None), None)
            if known is None:
                missing[statistic] = keys[0]
            else:
                found[statistic] = known
        for statistic, answer in answer_quantities(tuple(missing), stream).items():
            about = sources_of(self._catalog, *(stream.places[model] for model in statistic.models))
            self._keep(missing[statistic], answer, about)
            found[statistic] = answer
        return found

    def _known(self, statistic: AboutQuantity, key: bytes) -> Answer | None:
        """Return the answer that the catalog has under ``key``, or None."""
        if isinstance(statistic, ElementThreshold):
            limit = self._catalog.threshold(key)
            return None if limit is None else Threshold(limit.key, limit.cut)
        if isinstance(statistic, ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums):
            vector = self._catalog.vector(key)
            return None if vector is None else np.frombuffer(vector.values, dtype="<f8").astype(np.float64)
        return self._catalog.number(key)

    def _keep(self, key: bytes, answer: Answer, about: bytes) -> None:
        """Keep an answer in the catalog."""
        if isinstance(answer, Threshold):
            self._catalog.keep_threshold(key, ThresholdRecord(answer.key, answer.cut), about)
        elif isinstance(answer, float):
            self._catalog.keep_number(key, answer, about)
        else:
            self._catalog.keep_vector(key, VectorRecord(answer.astype("<f8").tobytes()), about)

    def _magnitudes(
        self,
        wanted: tuple[MagnitudeThreshold | MagnitudeRescale, ...],
        places: tuple[Place, ...],
        base: int | None,
        compute: DType,
    ) -> dict[Statistic, Answer]:
        """Return what is wanted of the magnitudes of deltas; thresholds of all experts from the same passes."""
        if not wanted:
            return {}
        if base is None:
            raise ValueError("a delta needs a base")
        pairs = {one.model: TensorPair(places[one.model], places[base], compute, self._reader) for one in wanted}
        ranks = [(one.model, keep) for one in wanted for keep in _ranks(one) if keep]
        limits = self._thresholds({rank: pairs[rank[0]] for rank in ranks})
        found: dict[Statistic, Answer] = {}
        for one in wanted:
            limit = limits[one.model, one.keep]
            outliers = limits.get((one.model, one.beyond)) if isinstance(one, MagnitudeRescale) else None
            found[one] = limit if isinstance(one, MagnitudeThreshold) else self._rescale(one, pairs, limit, outliers)
        return found

    def _rescale(
        self, wanted: MagnitudeRescale, pairs: dict[int, TensorPair], limit: Threshold, outliers: Threshold | None
    ) -> float:
        """Return how much larger the sum of all magnitudes is than that of those that are kept."""
        pair = pairs[wanted.model]
        keys = self._keys("rescale", (pair.expert, pair.base), pair.compute, f"{wanted.keep} {wanted.beyond}")
        known = self._known_number(keys)
        if known is not None:
            return known
        value = thresholds.rescale_factor(pair, limit, outliers)
        self._catalog.keep_number(keys[0], value, sources_of(self._catalog, pair.expert, pair.base))
        return value

    def _keys(self, kind: str, places: tuple[Place, ...], compute: DType, argument: int | str) -> list[bytes]:
        """Return the keys that a statistic may be kept under, the best first."""
        return statistic_keys(kind, places, compute, argument, self._catalog)

    def _known_number(self, keys: list[bytes]) -> float | None:
        """Return a number that the catalog has under one of ``keys``, or None."""
        return next((value for key in keys if (value := self._catalog.number(key)) is not None), None)

    def _thresholds(self, wanted: dict[tuple[int, int], TensorPair]) -> dict[tuple[int, int], Threshold]:
        """Return the thresholds of deltas by expert and rank."""
        found: dict[tuple[int, int], Threshold] = {}
        missing: dict[tuple[int, int], bytes] = {}
        for (model, keep), pair in wanted.items():
            keys = self._keys("threshold", (pair.expert, pair.base), pair.compute, keep)
            record = next((known for key in keys if (known := self._catalog.threshold(key)) is not None), None)
            if record is None:
                missing[model, keep] = keys[0]
            else:
                found[model, keep] = Threshold(record.key, record.cut)
        histograms = self._histograms({rank[0]: wanted[rank] for rank in missing})
        sought = [thresholds.Sought(wanted[rank], histograms[rank[0]], rank[1]) for rank in missing]
        for (rank, key), limit in zip(missing.items(), thresholds.find_thresholds(sought), strict=True):
            about = sources_of(self._catalog, wanted[rank].expert, wanted[rank].base)
            self._catalog.keep_threshold(key, ThresholdRecord(limit.key, limit.cut), about)
            found[rank] = limit
        return found

    def _histograms(self, pairs: dict[int, TensorPair]) -> dict[int, NDArray[np.int64]]:
        """Return the magnitude histograms of deltas by expert."""
        found: dict[int, NDArray[np.int64]] = {}
        for model, pair in pairs.items():
            known = known_histogram(pair.expert, pair.base, pair.compute, self._catalog)
            if known is not None:
                found[model] = known
        missing = {model: pair for model, pair in pairs.items() if model not in found}
        for (model, pair), counts in zip(
            missing.items(), thresholds.magnitude_histograms(list(missing.values())), strict=True
        ):
            key = histogram_keys(pair.expert, pair.base, pair.compute, self._catalog)[0]
            self._catalog.keep_histogram(key, pack(counts), sources_of(self._catalog, pair.expert, pair.base))
            found[model] = counts
        return found


def _ranks(statistic: MagnitudeThreshold | MagnitudeRescale) -> tuple[int, ...]:
    """Return the ranks whose thresholds an answer takes."""
    return (statistic.keep,) if isinstance(statistic, MagnitudeThreshold) else (statistic.keep, statistic.beyond)


def _kind(statistic: AboutQuantity) -> str:
    """Return what is asked about a quantity, as part of a key."""
    if isinstance(statistic, ElementThreshold):
        return f"keep {statistic.keep}"
    if isinstance(statistic, ElementQuantile):
        return f"rank {statistic.rank}"
    if isinstance(statistic, RowValues):
        return f"rows {statistic.row}"
    if isinstance(statistic, ElementSums):
        return f"sums {statistic.count}"
    if isinstance(statistic, SingleSums):
        return f"single sums {statistic.count}"
    if isinstance(statistic, ElementNorms):
        return f"norms {statistic.count} {statistic.widened} {statistic.chunk}"
    return f"columns {statistic.columns} {statistic.single}" if isinstance(statistic, ColumnSums) else "sum"
