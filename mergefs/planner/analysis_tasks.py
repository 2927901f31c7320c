"""What an analysis has to do, tensor by tensor, so that each is read once for all that is to be learned of it."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

from mergefs.catalog.catalog import Catalog
from mergefs.planner.plan import TensorPlan
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.blocks import deltas_are_known, known_norms
from mergefs.statistics.gathering import analyze_tensor, hash_tensor
from mergefs.statistics.identity import local_key
from mergefs.statistics.service import StatisticsService


@dataclass(frozen=True, slots=True)
class Measuring:
    """The deltas of one tensor of a family: its base, whether that lacks anything, and the experts that lack them."""

    tensor: TensorPlan
    base: Place
    base_lacks: bool
    experts: tuple[Place, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """All that may be read."""
        return (self.base, *self.experts)

    @property
    def lacking(self) -> Iterator[StoredTensor]:
        """The tensors in files that something is not known of."""
        for place in self.places if self.base_lacks else self.experts:
            yield from place.stored()


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor: what is only ``hashed`` of it, what is ``measured``, and the ``merged`` one that asks for more.

    In this order: statistics are kept under the contents of what they are about, and are found in the block statistics
    where these have them.
    """

    hashed: tuple[Place, ...] = ()
    measured: Measuring | None = None
    merged: TensorPlan | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        """All that may be read, each once."""
        measured = () if self.measured is None else self.measured.places
        merged = () if self.merged is None else self.merged.places
        return tuple({local_key(place): place for place in (*self.hashed, *measured, *merged)}.values())

    @property
    def size(self) -> int:
        """The bytes of all that may be read."""
        return sum(place.nbytes for place in self.places)

    @property
    def is_stored(self) -> bool:
        """Whether all of it lies in files."""
        return all(isinstance(place, StoredTensor) for place in self.places)

    def run(self, catalog: Catalog, reader: SourceReader, statistics: StatisticsService) -> None:
        """Go through it; what is found is kept at the catalog's next flush.

        Raises NonFiniteError naming the first tensor that holds a NaN or an infinity.
        """
        for place in self.hashed:
            hash_tensor(place, catalog, reader)
        if self.measured is not None:
            self.measured.tensor.prepare()
            analyze_tensor(self.measured.base, self.measured.experts, self.measured.tensor.compute, catalog, reader)
        if self.merged is not None:
            self.merged.prepare()
            if self.merged.method is not None and self.merged.context is not None:
                statistics.all_answers(self.merged.method, self.merged.context, self.merged.places)


@dataclass(frozen=True, slots=True)
class Tasks:
    """What there is to do: ``last`` are those that need what others among the ``first`` learn."""

    first: tuple[Task, ...]
    last: tuple[Task, ...]
    lacking: Set[bytes]
    """The local keys of tensors in files that something is not known of."""


def tasks_of(tensors: Sequence[TensorPlan], stored: Iterable[StoredTensor], catalog: Catalog) -> Tasks:
    """Return what has to be done for everything to be known of ``tensors``, and the hashes of all ``stored``."""
    measuring = {id(entry.tensor): entry for entry in _missing(tensors, catalog)}
    covered = {local_key(place) for entry in measuring.values() for place in entry.places}
    unhashed = {
        key: place
        for place in stored
        if (key := local_key(place)) not in covered and catalog.content_digest(key) is None
    }
    lacking = {local_key(place) for entry in measuring.values() for place in entry.lacking} | unhashed.keys()
    first, last = [], []
    for tensor in tensors:
        measured = measuring.get(id(tensor))
        merged = tensor if _asks(tensor) else None
        parts = dict.fromkeys(local_key(part) for place in tensor.places for part in place.stored()) if merged else {}
        hashed = tuple(unhashed.pop(key) for key in parts if key in unhashed)
        own = {local_key(place) for place in (*hashed, *(measured.lacking if measured else ()))}
        if not parts.keys() & lacking <= own:  # then another task learns some of it
            last.append(Task(merged=merged))
            merged = None
        if hashed or measured or merged:
            first.append(Task(hashed, measured, merged))
    first += [Task((place,)) for place in unhashed.values()]
    return Tasks(tuple(first), tuple(last), lacking)


def _asks(tensor: TensorPlan) -> bool:
    """Return whether its method asks for statistics of a tensor, or an input that is itself computed may."""
    if not all(isinstance(place, StoredTensor) for place in tensor.places):
        return True
    return tensor.method is not None and tensor.context is not None and bool(tensor.method.statistics(tensor.context))


def _missing(tensors: Iterable[TensorPlan], catalog: Catalog) -> list[Measuring]:
    """Return what is not known of the deltas of tensors, and of the norms of their bases; each once."""
    found = []
    begun: set[tuple[bytes, ...]] = set()
    for tensor in tensors:
        base, compute = tensor.stand_in, tensor.compute
        if tensor.context is None or base is None:
            continue
        about_base = (local_key(base), compute.name.encode())
        experts: dict[tuple[bytes, ...], Place] = {}
        for place, role in zip(tensor.places, tensor.roles, strict=True):
            key = (local_key(place), *about_base)
            if role is Role.EXPERT and key not in begun and not deltas_are_known(place, base, compute, catalog):
                experts[key] = place
        lacks = about_base not in begun and (
            catalog.content_digest(local_key(base)) is None or known_norms(base, compute, catalog) is None
        )
        if experts or lacks:
            begun |= {about_base, *experts}
            found.append(Measuring(tensor, base, lacks, tuple(experts.values())))
    return found
