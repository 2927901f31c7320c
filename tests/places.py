"""Where the tensors of a plan lie, for tests whose models are plain directories."""

from pathlib import Path

from mergefs.sources.place import Place, StoredTensor


def stored_tensor(place: Place) -> StoredTensor:
    """Return a place that must be a tensor in a file."""
    assert isinstance(place, StoredTensor)
    return place


def source_of(place: Place) -> Path:
    """Return the model directory that a place lies in."""
    return stored_tensor(place).shard.path.parent
