"""Which records of the catalog nothing needs any more, and why.

Nothing here is removed; ``collection`` does that. Each rule says in ``why`` what makes a record garbage:

* an aborted run that is old enough, and no other: runs that have written a model are its lineage;
* a plan that no run has begun to write and no mount shows, when it is old enough or one of its models is gone; with it
  its tensors and what was read of it;
* a model that is gone, and that no plan needs. It is gone when its directory holds other files now, or when it is not
  there and was not seen for long enough (a disk may be unplugged);
* a statistic about a tensor that no model which is there has, by its content or its file. While a model that is not
  gone cannot be opened no statistic is garbage, since it may be about that one;
* a vocabulary that is old enough: it is built again in seconds.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from mergefs.catalog.catalog import Catalog, Kept
from mergefs.catalog.envelope import SOURCE, today
from mergefs.checkpoint.adapter import open_adapter
from mergefs.checkpoint.checkpoint import WeightSource, open_checkpoint
from mergefs.checkpoint.weights import is_adapter
from mergefs.errors import CheckpointError
from mergefs.sources.place import StoredTensor
from mergefs.statistics.identity import local_key

STATISTICS: Final = (
    "contents",
    "deltas",
    "norms",
    "twins",
    "planes",
    "histograms",
    "thresholds",
    "numbers",
    "vectors",
)
_DAY_NS: Final = 86_400 * 10**9


class State(Enum):
    """What has become of a model that was seen once."""

    THERE = "there"
    CHANGED = "changed"
    """The directory holds other files now: these never come back."""
    ABSENT = "absent"
    """The directory is not there, or cannot be opened: it may come back."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """One record that nothing needs: its table, what it is called, why it is not needed, and what it takes."""

    table: str
    kept: Kept
    name: str
    why: str

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.kept.key) + len(self.kept.value)


@dataclass(frozen=True, slots=True)
class Needs:
    """What the rules go by: plans that mounts show, and how many days something may lie unused."""

    shown_plans: Collection[str]
    days: int
    state: "Callable[[str, str], Model]" = field(default_factory=lambda: look_at)

    def is_old(self, day: int) -> bool:
        """Return whether a day (since 1970) is long enough ago."""
        return day <= today() - self.days


@dataclass(frozen=True, slots=True)
class Model:
    """What has become of a model, and the keys of its tensors while it is there."""

    state: State
    keys: frozenset[bytes] = frozenset()


def look_at(path: str, local_identity: str) -> Model:
    """Open the directory that a model was seen in; only headers are read."""
    directory = Path(path)
    try:
        found: WeightSource = open_adapter(directory) if is_adapter(directory) else open_checkpoint(directory)
    except (CheckpointError, OSError):
        return Model(State.ABSENT)
    if found.local_identity != local_identity:
        return Model(State.CHANGED)
    places = (StoredTensor(found.shards[tensor.shard], tensor) for tensor in found.tensors.values())
    return Model(State.THERE, frozenset(map(local_key, places)))


def find_garbage(catalog: Catalog, needs: Needs) -> tuple[list[Garbage], list[str]]:
    """Return every record that nothing needs, and notes about what is kept to be careful.

    Raises CatalogError where a record is damaged: `mergefs catalog check` comes first.
    """
    models = {kept.key: needs.state(kept.record.path, kept.key.decode()) for kept in catalog.kept("checkpoints")}
    runs = list(_runs(catalog, needs))
    removed_runs = {one.kept.key for one in runs}
    named = {kept.record.plan_id for kept in catalog.kept("transactions") if kept.key not in removed_runs}
    plans = list(_plans(catalog, needs, models, named))
    removed_plans = {one.kept.key for one in plans}
    needed = {
        entry.local_identity.encode()
        for kept in catalog.kept("plans")
        if kept.key not in removed_plans
        for entry in kept.record.inputs
    }
    gone = list(_models(catalog, needs, models, needed))
    garbage = [*runs, *plans, *_parts(catalog, removed_plans), *gone, *_vocabularies(catalog, needs)]
    kept_models = {key: model for key, model in models.items() if key not in {one.kept.key for one in gone}}
    notes = _unopened(catalog, kept_models)
    if not notes:
        garbage += _statistics(catalog, needs, kept_models)
    return garbage, notes


def _runs(catalog: Catalog, needs: Needs) -> Iterator[Garbage]:
    for kept in catalog.kept("transactions"):
        if kept.record.state == "aborted" and needs.is_old(kept.record.changed_ns // _DAY_NS):
            yield Garbage("transactions", kept, kept.record.destination, "the run was given up")


def _plans(catalog: Catalog, needs: Needs, models: Mapping[bytes, Model], named: Collection[str]) -> Iterator[Garbage]:
    for kept in catalog.kept("plans"):
        plan_id = kept.record.plan_id
        if plan_id in named or plan_id in needs.shown_plans:
            continue
        states = (models.get(entry.local_identity.encode()) for entry in kept.record.inputs)
        if any(model is not None and model.state is not State.THERE for model in states):
            yield Garbage("plans", kept, plan_id, "a model that it reads is gone")
        elif needs.is_old(kept.record.created_ns // _DAY_NS):
            yield Garbage("plans", kept, plan_id, "no run and no mount uses it")


def _parts(catalog: Catalog, plans: Collection[bytes]) -> Iterator[Garbage]:
    for table in ("entries", "readings"):
        for kept in catalog.kept(table):
            if kept.key.partition(b"/")[0] in plans:
                yield Garbage(table, kept, kept.key.decode(), "its plan is removed")


def _models(
    catalog: Catalog, needs: Needs, models: Mapping[bytes, Model], needed: Collection[bytes]
) -> Iterator[Garbage]:
    for kept in catalog.kept("checkpoints"):
        if kept.key in needed:
            continue
        state = models[kept.key].state
        if state is State.CHANGED:
            yield Garbage("checkpoints", kept, kept.record.path, "the directory holds other files now")
        elif state is State.ABSENT and needs.is_old(kept.day):
            yield Garbage("checkpoints", kept, kept.record.path, "it is not there, and was not for long")


def _vocabularies(catalog: Catalog, needs: Needs) -> Iterator[Garbage]:
    for kept in catalog.kept("vocabularies"):
        if needs.is_old(kept.day):
            yield Garbage("vocabularies", kept, kept.key.hex(), "it is old, and built again in seconds")


def _statistics(catalog: Catalog, needs: Needs, models: Mapping[bytes, Model]) -> list[Garbage]:
    live = _live(catalog, models)
    found = [
        Garbage(table, kept, kept.key.hex(), "no model that is there has the tensor")
        for table in STATISTICS
        for kept in catalog.kept(table)
        if kept.about and not live.issuperset(_keys(kept))
    ]
    if not found:
        return found
    # Other processes analyse meanwhile. They tell of a model before anything about it, so a look at what there is now
    # finds what any of the statistics that were found is about.
    came = {kept.key: kept.record.path for kept in catalog.kept("checkpoints") if kept.key not in models}
    live = _live(catalog, {**models, **{key: needs.state(path, key.decode()) for key, path in came.items()}})
    return [one for one in found if not live.issuperset(_keys(one.kept))]


def _live(catalog: Catalog, models: Mapping[bytes, Model]) -> set[bytes]:
    """Return the keys of all tensors of models that are there, by their files and by their contents."""
    live = set().union(*(model.keys for model in models.values()))
    return live | {kept.record.digest for kept in catalog.kept("contents") if kept.key in live}


def _keys(kept: Kept) -> list[bytes]:
    return [kept.about[start : start + SOURCE] for start in range(0, len(kept.about), SOURCE)]


def _unopened(catalog: Catalog, models: Mapping[bytes, Model]) -> list[str]:
    """Return a note where statistics may be about a model that is not there now."""
    for kept in catalog.kept("checkpoints"):
        model: Any = models.get(kept.key)
        if model is not None and model.state is State.ABSENT:
            return [
                f"statistics are kept, since some may be about {kept.record.path}, which cannot be opened now; "
                "--older-than says how long such a model is waited for"
            ]
    return []
