"""``mergefs verify``: a written model against its manifest, and against its sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.errors import RecipeError, VerificationError
from mergefs.materialize.manifest import MANIFEST_NAME, FileEntry, read_manifest
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.progress import Progress, Silence
from mergefs.recipe.model import parse_recipe

_CHUNK: Final = 8 * 2**20


class _Budget(msgspec.Struct, frozen=True):
    budget_bytes: int | None


class _StandIn(msgspec.Struct, frozen=True):
    reference: str


class _Provenance(msgspec.Struct, frozen=True):
    """The part of ``mergefs.json`` that a plan can be made from again."""

    plan_id: str
    recipe: str
    budget: _Budget
    stand_in: _StandIn | None
    random_seed: int
    max_shard_size: int
    truncate_embeddings: bool
    copy_tokenizer: bool
    write_model_card: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found sound."""

    directory: Path
    plan_id: str
    files: int
    bytes_checked: int
    deep: bool


def verify(directory: Path, progress: Progress | None = None) -> Verified:
    """Check size and hash of every file in the manifest; VerificationError names the first one that is wrong."""
    manifest = read_manifest(directory)
    total = sum(entry.size for entry in manifest.files.values())
    listener = progress or Silence()
    listener.start("verifying", total)
    for name, entry in manifest.files.items():
        _check_file(directory / name, entry, listener)
    for path in sorted(directory.rglob("*.safetensors")):
        if path.relative_to(directory).as_posix() not in manifest.files:
            raise VerificationError(f"{path}: is not in {MANIFEST_NAME}; remove it, since loaders may pick it up")
    listener.finish()
    return Verified(directory, manifest.plan_id, len(manifest.files), total, deep=False)


def verify_deep(directory: Path, resources: Workspace, progress: Progress | None = None) -> Verified:
    """Check as ``verify`` does, then compute every file from the sources again and compare all bytes."""
    shallow = verify(directory, progress)
    provenance = _read_provenance(directory)
    recipe = parse_recipe(provenance.recipe, str(directory / "mergefs.json"), directory)
    budget = provenance.budget.budget_bytes
    options = PlanOptions(
        budget=None if budget is None else str(budget),
        base=provenance.stand_in.reference if provenance.stand_in else None,
        random_seed=provenance.random_seed,
        max_shard_size=provenance.max_shard_size,
        truncate_embeddings=provenance.truncate_embeddings,
        copy_tokenizer=provenance.copy_tokenizer,
        write_model_card=provenance.write_model_card,
    )
    listener = progress or Silence()
    try:
        plan = make_plan(recipe, options, resources, listener)
    except RecipeError as error:
        raise VerificationError(
            f"{error} (relative paths count from the current directory: try again from where the model was written)"
        ) from error
    files = ModelFiles(plan, resources, strict=True)
    listener.start("recomputing", sum(files.sizes.values()))
    for name, size in files.sizes.items():
        if files.is_merged(name):
            _compare(directory / name, files, name, size, listener)
    listener.finish()
    return Verified(directory, shallow.plan_id, shallow.files, shallow.bytes_checked, deep=True)


def _check_file(path: Path, entry: FileEntry, progress: Progress) -> None:
    """Check one file against its entry."""
    hasher = blake3()
    size = 0
    try:
        for chunk in _read(path):
            hasher.update(chunk)
            size += len(chunk)
            progress.advance(len(chunk))
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror}); materialize the model again") from error
    if size != entry.size:
        raise VerificationError(
            f"{path}: has {size} bytes and was written with {entry.size}; materialize the model again"
        )
    if hasher.hexdigest() != entry.blake3:
        raise VerificationError(
            f"{path}: is damaged: its blake3 hash is {hasher.hexdigest()[:16]}... and was {entry.blake3[:16]}...; "
            "materialize the model again"
        )


def _compare(path: Path, files: ModelFiles, name: str, size: int, progress: Progress) -> None:
    """Compare a written weight file with what the sources give now."""
    offset = 0
    for chunk in _read(path):
        expected = files.read(name, offset, len(chunk))
        if chunk != expected:
            place = offset + next(i for i, (a, b) in enumerate(zip(chunk, expected, strict=False)) if a != b)
            tensor = _tensor_at(files, name, place)
            raise VerificationError(
                f"{path}: byte {place} differs from what the sources give now, in tensor {tensor}; "
                "the sources or the model changed since it was written"
            )
        offset += len(chunk)
        progress.advance(len(chunk))
    if offset != size:
        raise VerificationError(f"{path}: has {offset} bytes and the sources give {size}; materialize the model again")


def _tensor_at(files: ModelFiles, name: str, place: int) -> str:
    """Return the tensor that holds a byte of a weight file."""
    file = next(file for file in files.plan.files if file.name == name)
    before = [tensor for tensor, begin in zip(file.tensors, file.offsets, strict=True) if begin <= place]
    return repr(before[-1]) if before else "none (the header)"


def _read_provenance(directory: Path) -> _Provenance:
    """Return what ``mergefs.json`` says."""
    path = directory / "mergefs.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Provenance)
    except (OSError, msgspec.DecodeError) as error:
        raise VerificationError(f"{path}: cannot be read ({error}); materialize the model again") from error


def _read(path: Path) -> Iterator[bytes]:
    """Yield the content of a file."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
