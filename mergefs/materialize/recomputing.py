"""``mergefs verify --deep``: a written model against what its sources give now."""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.errors import RecipeError, UsageError, VerificationError
from mergefs.materialize.manifest import read_manifest
from mergefs.materialize.pieces import Pieces, ahead
from mergefs.materialize.system import read_all
from mergefs.materialize.verify import Damage, Verified, verify
from mergefs.planner.ancestry import FORMAT, PROVENANCE_NAME
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.layout import lay_out_as_written
from mergefs.planner.plan import MergePlan, OutputFile
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence
from mergefs.recipe.model import parse_recipe

_RUN: Final = 8 * 2**20
"""Bytes that are compared at a time."""


class _Budget(msgspec.Struct, frozen=True):
    budget_bytes: int | None


class _StandIn(msgspec.Struct, frozen=True):
    reference: str


class _Provenance(msgspec.Struct, frozen=True):
    """The part of ``mergefs.json`` that a plan can be made from again, in every format."""

    format: int
    recipe: str
    budget: _Budget
    stand_in: _StandIn | None
    random_seed: int
    max_shard_size: int
    truncate_embeddings: bool
    copy_tokenizer: bool
    write_model_card: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """How many pieces of the weights are recomputed: so many, or this share (0 to 1) of all; chosen at random."""

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Sample":
        """Return what ``text`` means: ``100`` pieces, or ``5%`` of them. Raises UsageError."""
        number = text.strip().removesuffix("%").rstrip()
        try:
            if text.strip().endswith("%") and 0 < float(number) <= 100:
                return cls(share=float(number) / 100)
            if text.strip() == number and int(number) > 0:
                return cls(count=int(number))
        except ValueError:
            pass
        raise UsageError(f"--sample {text!r} is neither a number of pieces (100) nor a share (5%); give one of them")

    def choose(self, pieces: int, chance: random.Random) -> list[int]:
        """Return which of ``pieces`` pieces are looked at, in their order; at least one where there are any."""
        wanted = self.count if self.count is not None else round((self.share or 0) * pieces)
        return sorted(chance.sample(range(pieces), min(max(wanted, 1), pieces)))


def verify_deep(
    directory: Path, resources: Workspace, progress: Progress | None = None, sample: Sample | None = None
) -> Verified:
    """Check as ``verify`` does, then compute the weights from the sources again and compare all bytes.

    With a ``sample`` only some pieces, chosen at random, are computed. VerificationError names the first difference.
    """
    shallow = verify(directory, progress)
    recomputed = 0
    for found in recompute(directory, resources, progress, sample):
        if isinstance(found, Damage):
            raise VerificationError(found.sentence)
        recomputed += found
    return replace(shallow, recomputed_bytes=recomputed)


def recompute(
    directory: Path,
    resources: Workspace,
    progress: Progress | None = None,
    sample: Sample | None = None,
    chance: random.Random | None = None,
) -> Iterator[int | Damage]:
    """Yield for each run of bytes of the weights its length where the sources give the same now, else the difference.

    Of a ``sample``, ``chance`` chooses the pieces. Raises the errors of planning and of sources.
    """
    files = _planned_again(directory, resources, progress)
    yield from _compare(directory, files, sample, chance or random.Random(), progress or Silence())


def _planned_again(directory: Path, resources: Workspace, progress: Progress | None) -> ModelFiles:
    """Return the files of the model as they are computed from the sources now."""
    provenance = _read_provenance(directory)
    recipe = parse_recipe(provenance.recipe, str(directory / PROVENANCE_NAME), Path.cwd(), directory)
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
    try:
        plan = make_plan(recipe, options, resources, progress)
        return ModelFiles(replace(plan, files=_files_as_written(directory, plan)), resources, strict=True)
    except RecipeError as error:
        raise VerificationError(
            f"{error} (relative paths count from the current directory: try again from where the model was written)"
        ) from error


def _files_as_written(directory: Path, plan: MergePlan) -> tuple[OutputFile, ...]:
    """Return the files of a plan laid out as they were written: how sources are cut may have changed since."""
    entries = read_manifest(directory).tensors
    written = {name: (entry.file, entry.offset) for name, entry in entries.items()}
    now = {
        name: (file.name, offset)
        for file in plan.files
        for name, offset in zip(file.tensors, file.offsets, strict=True)
    }
    # Other tensors, or of other sizes, are a difference that is told by comparing.
    same_tensors = {name: entry.size for name, entry in entries.items()} == {
        name: tensor.nbytes for name, tensor in plan.tensors.items()
    }
    return lay_out_as_written(plan.tensors, written) if same_tensors and written != now else plan.files


@dataclass(frozen=True, slots=True)
class _Run:
    """The bytes ``begin`` to ``end`` of a weight file that is cut into ``pieces``."""

    file: str
    pieces: Pieces
    begin: int
    end: int


def _runs(files: ModelFiles, size: int) -> Iterator[_Run]:
    """Yield runs of whole pieces of all weight files, of ``size`` bytes or one piece."""
    for file in files.plan.files:
        pieces = Pieces.of_output(file, files.plan.tensors)
        for run in pieces.runs(size):
            yield _Run(file.name, pieces, pieces.bounds[run.start], pieces.bounds[run.stop])


def _compare(
    directory: Path, files: ModelFiles, sample: Sample | None, chance: random.Random, progress: Progress
) -> Iterator[int | Damage]:
    """Yield for each run of bytes that was compared its length, and the first difference of each that differs."""
    runs = list(_runs(files, _RUN if sample is None else 0))
    if sample is not None:
        runs = [runs[index] for index in sample.choose(len(runs), chance)]
    sizes = {name: entry.size for name, entry in read_manifest(directory).files.items()}
    progress.start("recomputing", sum(run.end - run.begin for run in runs))

    def compare(index: int) -> int | Damage:
        run = runs[index]
        path, now = directory / run.file, files.sizes[run.file]
        if sizes.get(run.file) != now:
            sentence = (
                f"{path}: has {sizes.get(run.file, 0)} bytes and the sources give {now}; "
                "restore the sources, or materialize the model again"
            )
            return Damage(path, None, (), sentence)
        return _compare_run(path, files, run)

    with ThreadPoolExecutor(max(2, usable_processors()), thread_name_prefix="verify") as pool:
        for index, found in enumerate(ahead(pool, compare, range(len(runs)))):
            yield found
            progress.advance(runs[index].end - runs[index].begin)
    progress.finish()


def _compare_run(path: Path, files: ModelFiles, run: _Run) -> int | Damage:
    """Return its size where a run of bytes is what the sources give, else where it differs first."""
    size = run.end - run.begin
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = read_all(descriptor, size, run.begin)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror}); materialize the model again") from error
    expected = files.read(run.file, run.begin, size)
    if there == expected:
        return size
    place = run.begin + next(i for i, (a, b) in enumerate(zip(there, expected, strict=False)) if a != b)
    piece = run.pieces.at(place)
    tensor = run.pieces.tensor_of(piece)
    where = "the header" if tensor is None else f"tensor {tensor!r}"
    sentence = (
        f"{path}: byte {place} (piece {piece}) differs from what the sources give now, in {where}; "
        "restore the sources, or materialize the model again"
    )
    return Damage(path, piece, () if tensor is None else (tensor,), sentence)


def _read_provenance(directory: Path) -> _Provenance:
    """Return what ``mergefs.json`` says."""
    path = directory / PROVENANCE_NAME
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Provenance)
    except (OSError, msgspec.DecodeError) as error:
        raise VerificationError(f"{path}: cannot be read ({error}); materialize the model again") from error
    if found.format > FORMAT:
        raise VerificationError(
            f"{path}: has format {found.format} and this mergefs knows formats up to {FORMAT}; upgrade mergefs"
        )
    return found
