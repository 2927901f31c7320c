"""Planes in the catalog: coded once for the same bytes, safe from interruptions, never read when damaged."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, write_model
from examples import Families, FamilyKind
from recipes import MERGES, write_document, write_recipe
from worlds import make_world

from mergefs.catalog import Catalog
from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.engine.workspace import Workspace
from mergefs.errors import CatalogError, NonFiniteError, SourceChangedError
from mergefs.kernels.precision import Array, load, store
from mergefs.planes import analysis
from mergefs.planes.analysis import PlanesWritten, analyze_planes
from mergefs.planes.coded import CodedDelta, can_have_planes, known_planes
from mergefs.planes.encoding import DeltaTask
from mergefs.planes.files import PlaneFile, planes_directory, remove_leftovers
from mergefs.planner.build import PlanOptions, draft_plan
from mergefs.planner.planes import delta_tasks
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.place import Role, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.gathering import hash_tensor

NAME = "w.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of a few rows, so that small ones have many."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2048)


@dataclass(frozen=True, slots=True)
class Deltas:
    """A base and an expert on disk, and what reads them."""

    expert: Path
    base: Path
    catalog: Catalog
    reader: SourceReader
    ledger: Ledger

    def task(self, name: str = NAME, compute: DType = BF16, planes: int = 3, cells: int = 4) -> DeltaTask:
        expert, base = open_checkpoint(self.expert), open_checkpoint(self.base)
        places = StoredTensor.of(expert, name), StoredTensor.of(base, name, Role.BASE)
        return DeltaTask(*places, compute, planes, cells)

    def encode(self, *tasks: DeltaTask) -> PlanesWritten:
        return analyze_planes({"expert": tasks}, self.catalog, self.reader, Silence())["expert"]

    def known(self, task: DeltaTask) -> CodedDelta:
        found = known_planes(task.expert, task.base, task.compute, self.catalog)
        assert found is not None
        return found

    def decode(self, task: DeltaTask, coded: CodedDelta, cell: int, level: int) -> Array:
        base = load(task.base.read(self.reader, *coded.grid.bounds(cell), Purpose.BASE), task.base.dtype, task.compute)
        raw = coded.decode(
            self.reader, store(base, task.compute, task.compute), range(cell, cell + 1), level, Purpose.EXPERT
        )
        return load(raw, task.compute, task.compute)

    def files(self) -> list[Path]:
        directory = planes_directory(self.catalog.path)
        return sorted(directory.iterdir()) if directory.exists() else []


@contextmanager
def deltas_of(directory: Path, expert: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> Iterator[Deltas]:
    ledger = Ledger()
    reader = SourceReader(ledger)
    places = write_model(directory / "expert", expert, {}), write_model(directory / "base", base, {})
    with Catalog(directory / "catalog") as catalog:
        yield Deltas(*places, catalog, reader, ledger)
    reader.close()


def family(
    dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (70, 64), count: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return an expert's and a base's tensors."""
    generator = torch.Generator().manual_seed(11)
    base = {f"w{i or ''}.weight": torch.randn(shape, generator=generator) / 50 for i in range(count)}
    expert = {name: tensor + torch.randn(shape, generator=generator) / 500 for name, tensor in base.items()}
    return {n: t.to(dtype) for n, t in expert.items()}, {n: t.to(dtype) for n, t in base.items()}


@pytest.fixture
def deltas(tmp_path: Path) -> Iterator[Deltas]:
    with deltas_of(tmp_path, *family()) as made:
        yield made


@pytest.mark.parametrize("compute", [BF16, F16, F32, F64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_level_of_every_cell_has_the_error_that_is_known(
    tmp_path: Path, stored: torch.dtype, compute: DType
) -> None:
    with deltas_of(tmp_path, *family(stored)) as deltas:
        task = deltas.task(compute=compute)
        deltas.encode(task)
        coded = deltas.known(task)
        assert (coded.planes, coded.grid) == (3, task.grid)
        for cell, (start, stop) in enumerate(coded.grid):
            raw = task.expert.read(deltas.reader, start, stop, Purpose.ANALYSIS)
            exact = load(raw, task.expert.dtype, compute).astype(np.float64)
            for level in range(4):
                error = ((exact - deltas.decode(task, coded, cell, level)) ** 2).sum()
                assert error <= coded.left[level, cell] <= error * (1 + 1e-6) + 1e-45
        assert (np.diff(coded.left, axis=0) < 0).all()
        assert coded.energies is not coded.left
        assert (coded.energies == coded.left[0]).all()


def test_what_is_read_is_what_is_announced_and_counted_as_the_experts(deltas: Deltas) -> None:
    task = deltas.task()
    deltas.encode(task)
    coded = deltas.known(task)
    for level in range(4):
        before = deltas.ledger.totals().expert_bytes_read
        for cell in range(coded.grid.count):
            deltas.decode(task, coded, cell, level)
        assert deltas.ledger.totals().expert_bytes_read - before == coded.bytes_read(level).sum()
    assert coded.nbytes == coded.bytes_read(3).sum() == coded.file.path.stat().st_size


def test_cells_side_by_side_are_what_each_of_them_is(tmp_path: Path) -> None:
    expert, base = family()
    expert[NAME][20:45] = base[NAME][20:45]
    with deltas_of(tmp_path, expert, base) as deltas:
        task = deltas.task()
        deltas.encode(task)
        coded = deltas.known(task)
        assert not coded.layout.coded.all()
        whole = task.base.read(deltas.reader, 0, task.base.elements, Purpose.BASE)
        apart = [deltas.decode(task, coded, cell, 2) for cell in range(coded.grid.count)]
        together = coded.decode(deltas.reader, whole, range(coded.grid.count), 2, Purpose.EXPERT)
        assert np.array_equal(load(together, BF16, BF16), np.concatenate(apart))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1), (5000,), (9, 1), (1, 3000), (3, 7, 11), (40, 129)])
def test_tensors_of_any_shape_are_coded(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with deltas_of(tmp_path, *family(torch.float32, shape)) as deltas:
        task = deltas.task(compute=F32, planes=2)
        deltas.encode(task)
        coded = deltas.known(task)
        assert coded.left[2].sum() < 0.2 * coded.left[0].sum()
        decoded = [deltas.decode(task, coded, cell, 2) for cell in range(coded.grid.count)]
        assert sum(part.size for part in decoded) == task.base.elements


# Once -----------------------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_coded_again(deltas: Deltas) -> None:
    first = deltas.encode(deltas.task())
    assert (first.tensors, first.known, first.bytes_written) == (1, 0, deltas.files()[0].stat().st_size)
    assert first.files == tuple(deltas.files())
    again = deltas.encode(deltas.task())
    assert again == PlanesWritten(known=1)
    assert deltas.encode(deltas.task(planes=2)) == PlanesWritten(known=1)
    assert deltas.known(deltas.task()).planes == 3


def test_more_planes_are_coded_anew_and_begin_with_the_same(deltas: Deltas) -> None:
    deltas.encode(deltas.task(planes=1))
    fewer = deltas.known(deltas.task())
    assert deltas.encode(deltas.task(planes=4)).tensors == 1
    more = deltas.known(deltas.task())
    assert (more.planes, fewer.planes) == (4, 1)
    assert (more.left[:2] == fewer.left).all()
    assert more.digest != fewer.digest


def test_the_same_bytes_in_other_places_are_known(deltas: Deltas, tmp_path: Path) -> None:
    expert, base = family()
    other = Deltas(
        write_model(tmp_path / "copy" / "expert", expert, {}),
        write_model(tmp_path / "copy" / "base", base, {}),
        deltas.catalog,
        deltas.reader,
        deltas.ledger,
    )
    for made in (deltas, other):
        for place in (made.task().expert, made.task().base):
            hash_tensor(place, deltas.catalog, deltas.reader)
    deltas.catalog.flush()
    deltas.encode(deltas.task())
    assert other.encode(other.task()) == PlanesWritten(known=1)
    assert other.known(other.task()).digest == deltas.known(deltas.task()).digest


def test_two_tensors_of_the_same_bytes_are_coded_once(tmp_path: Path) -> None:
    expert, base = family()
    twice = {**expert, "v.weight": expert[NAME].clone()}, {**base, "v.weight": base[NAME].clone()}
    with deltas_of(tmp_path, *twice) as deltas:
        tasks = deltas.task(), deltas.task("v.weight")
        for task in tasks:
            for place in (task.expert, task.base):
                hash_tensor(place, deltas.catalog, deltas.reader)
        deltas.catalog.flush()
        written = deltas.encode(*tasks)
        assert (written.tensors, written.known) == (1, 1)
        assert deltas.known(tasks[0]).offset == deltas.known(tasks[1]).offset


def test_the_coded_bytes_do_not_depend_on_how_many_threads_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for threads in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=threads: set(range(count)))
        with deltas_of(tmp_path / str(threads), *family(count=3)) as deltas:
            deltas.encode(*(deltas.task(name) for name in (NAME, "w1.weight", "w2.weight")))
            digests.add((deltas.known(deltas.task()).digest, deltas.files()[0].name))
    assert len(digests) == 1


def test_a_tensor_that_is_the_bases_needs_none(tmp_path: Path) -> None:
    _, base = family()
    with deltas_of(tmp_path, base, base) as deltas:
        task = deltas.task()
        for place in (task.expert, task.base):
            hash_tensor(place, deltas.catalog, deltas.reader)
        deltas.catalog.flush()
        assert deltas.encode(task) == PlanesWritten(equal=1)
        assert deltas.files() == []
        assert known_planes(task.expert, task.base, BF16, deltas.catalog) is None


def test_only_numbers_that_are_stored_can_have_planes(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    base = open_checkpoint(world.base)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored, other = StoredTensor.of(base, name), StoredTensor.of(base, "model.norm.weight")
    assert can_have_planes(stored, stored)
    assert not can_have_planes(stored, other)
    assert not can_have_planes(stored, None)
    recipe = {"merge_method": "linear", "models": [{"model": world.adapted, "parameters": {"weight": 1}}]}
    path = write_document(tmp_path / "recipe.yml", recipe)
    workspace = Workspace.create(Catalog(tmp_path / "catalog"))
    draft = draft_plan(load_recipe(path), PlanOptions(base=str(world.first)), workspace)
    (tasks,) = delta_tasks(draft.tensors, draft.sources, 2).values()
    workspace.close()
    coded = {task.expert.tensor.name for task in tasks if isinstance(task.expert, StoredTensor)}
    assert coded == {tensor for tensor in base.tensors if "q_proj" not in tensor and "up_proj" not in tensor}
    whole = open_checkpoint(write_model(tmp_path / "whole", {NAME: torch.arange(8)}, {}))
    assert not can_have_planes(StoredTensor.of(whole, NAME), StoredTensor.of(whole, NAME))


def test_progress_is_told_of_every_byte_of_the_experts_that_is_coded(tmp_path: Path) -> None:
    with deltas_of(tmp_path, *family(count=2)) as deltas:
        first, second = deltas.task(), deltas.task("w1.weight")
        deltas.encode(first)
        progress = Recorder([], [])
        analyze_planes({"expert": [first, second]}, deltas.catalog, deltas.reader, progress)
        assert progress.started == [("coding deltas", second.expert.nbytes)]
        assert sum(progress.steps) == second.expert.nbytes


@dataclass(frozen=True, slots=True)
class Recorder:
    """Writes down what a progress display is told."""

    started: list[tuple[str, int]]
    steps: list[int]

    def start(self, title: str, total: int) -> None:
        self.started.append((title, total))

    def advance(self, size: int) -> None:
        self.steps.append(size)

    def finish(self) -> None:
        """Nothing is written down."""


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_gone_or_another_one_is_not_known(deltas: Deltas) -> None:
    task = deltas.task()
    deltas.encode(task)
    path = deltas.files()[0]
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"\0", content):
        path.write_bytes(damaged)
        assert known_planes(task.expert, task.base, BF16, deltas.catalog) is None
    path.unlink()
    assert known_planes(task.expert, task.base, BF16, deltas.catalog) is None
    assert deltas.encode(task).tensors == 1
    assert path.read_bytes() == content
    deltas.known(task)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_file_that_changes_after_planning_is_not_read(deltas: Deltas, damage: str) -> None:
    task = deltas.task()
    deltas.encode(task)
    coded = deltas.known(task)
    if damage == "gone":
        coded.file.path.unlink()
    elif damage == "cut":
        os.truncate(coded.file.path, 100)
    else:
        coded.file.path.write_bytes(b"x" * coded.file.fingerprint.size)
    with pytest.raises(SourceChangedError, match=coded.file.path.name):
        deltas.decode(task, coded, 1, 2)


def test_a_bit_that_flips_on_the_disk_is_noticed(deltas: Deltas) -> None:
    task = deltas.task()
    deltas.encode(task)
    path = deltas.files()[0]
    status = path.stat()
    offset = int(deltas.known(task).bytes_read(3)[0]) + 5
    with path.open("r+b") as file:
        file.seek(offset)
        octet = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([octet ^ 16]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    coded = deltas.known(task)
    deltas.decode(task, coded, 0, 3)
    with pytest.raises(SourceChangedError, match=r"is not what was written; remove the file"):
        deltas.decode(task, coded, 1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_and_what_was_done_before_is_kept(tmp_path: Path, value: float) -> None:
    expert, base = family(count=2)
    expert["w1.weight"][50, 3] = value
    with deltas_of(tmp_path, expert, base) as deltas:
        with pytest.raises(NonFiniteError, match=r"w1\.weight"):
            deltas.encode(deltas.task(), deltas.task("w1.weight"))
        coded = deltas.known(deltas.task())
        assert coded.nbytes == deltas.files()[0].stat().st_size
        assert len(deltas.files()) == 1


# Interruptions --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_whole_tensors_and_the_next_one_codes_the_rest(
    deltas: Deltas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deltas_of(tmp_path / "more", *family(count=4)) as more:
        names = [NAME, "w1.weight", "w2.weight", "w3.weight"]
        tasks = [more.task(name) for name in names]
        appended = PlaneFile.append
        calls = iter(range(1000))

        def interrupt(self: PlaneFile, data: bytes) -> None:
            if next(calls) == 2 * tasks[0].grid.count + 1:
                raise KeyboardInterrupt
            appended(self, data)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PlaneFile, "append", interrupt)
            more.encode(*tasks)
        kept = [known_planes(task.expert, task.base, BF16, more.catalog) for task in tasks]
        assert [planes is not None for planes in kept] == [True, True, False, False]
        assert sum(planes.nbytes for planes in kept if planes) == more.files()[0].stat().st_size
        written = more.encode(*tasks)
        assert (written.tensors, written.known) == (2, 2)
        whole = [more.known(task).digest for task in tasks]
    with deltas_of(tmp_path / "at-once", *family(count=4)) as once:
        tasks = [once.task(name) for name in names]
        once.encode(*tasks)
        assert [once.known(task).digest for task in tasks] == whole


def test_large_runs_are_kept_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "_FILE_BYTES", 1)
    with deltas_of(tmp_path, *family(count=3)) as deltas:
        tasks = [deltas.task(name) for name in (NAME, "w1.weight", "w2.weight")]
        written = deltas.encode(*tasks)
        assert len(written.files) == len(deltas.files()) == 3
        assert written.bytes_written == sum(path.stat().st_size for path in deltas.files())
        for task in tasks:
            deltas.decode(task, deltas.known(task), 0, 3)


def test_what_a_killed_run_has_left_is_removed_but_not_what_another_is_writing(tmp_path: Path) -> None:
    writing = PlaneFile(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; from mergefs.planes.files import PlaneFile\n"
        "PlaneFile(Path(sys.argv[1])).append(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    writing.append(b"whole")
    writing.seal()
    name, status = writing.commit()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"whole"
    assert status.st_size == 5


def test_only_what_is_sealed_is_kept(tmp_path: Path) -> None:
    names = []
    for tail in (b"", b"half"):
        file = PlaneFile(tmp_path)
        file.append(b"whole")
        file.seal()
        file.append(tail)
        names.append(file.commit()[0])
    assert names[0] == names[1]
    assert (tmp_path / names[0]).read_bytes() == b"whole"


def test_a_directory_that_cannot_be_written_is_named(deltas: Deltas) -> None:
    planes_directory(deltas.catalog.path).write_text("in the way")
    with pytest.raises(CatalogError, match=r"delta planes cannot be written .*--catalog"):
        deltas.encode(deltas.task())


def test_a_full_disk_is_named_and_leaves_nothing(deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CatalogError, match=r"cannot be written \(No space left on device\); free some space"):
        deltas.encode(deltas.task())
    assert deltas.files() == []


# The command ----------------------------------------------------------------------------------------------------------


def analyze(catalog: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergefs.cli", "--catalog", str(catalog), "analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def recipe_for(directory: Path, family: Family) -> Path:
    return write_recipe(directory / "recipe.yml", MERGES["task_arithmetic"], family)


def test_the_command_says_what_it_wrote_for_each_expert_and_where(tmp_path: Path, families: Families) -> None:
    made = families(FamilyKind(experts=2))
    recipe, catalog = recipe_for(tmp_path, made), tmp_path / "catalog"
    first = json.loads(analyze(catalog, recipe, "--planes", 2, "--json").stdout)["planes"]
    assert [entry["path"] for entry in first] == [str(expert) for expert in made.experts]
    for entry in first:
        (name,) = entry["files"]
        assert Path(name).parent == catalog / "planes"
        assert entry["bytes_written"] == Path(name).stat().st_size
        assert entry["tensors_coded"] > 0
    shown = analyze(catalog, recipe, "--planes", 2).stdout
    assert f"delta planes are in {catalog / 'planes'}" in shown
    assert "everything was known already" in shown


def test_planes_of_a_model_alone_are_refused(tmp_path: Path, families: Families) -> None:
    made = families(FamilyKind(experts=2))
    refused = analyze(tmp_path / "catalog", made.base, "--planes", 2)
    assert refused.returncode == 2
    assert f"--planes is for recipes, and {made.base} is a model directory" in refused.stderr


@pytest.mark.parametrize("number", [0, 9, "x"])
def test_only_one_to_eight_planes_can_be_had(tmp_path: Path, number: object) -> None:
    assert analyze(tmp_path / "catalog", tmp_path / "recipe.yml", "--planes", number).returncode == 2
