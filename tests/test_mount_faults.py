"""Sources that fail under a mount: the right error for who reads, a line in the log, and no harm to anybody else."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pytest
import torch
from checkpoints import Family, family
from faulty_files import FaultyFiles, faulty_files
from mounting import DEADLINE, Mount, is_running, mounted_recipes, run_mergefs, wait_for
from recipes import Merge, write_recipe
from sentences import REMEDY

import mergefs
from mergefs.mount.mountinfo import find_mount, state
from mergefs.mount.unmount import read_status

pytestmark = pytest.mark.mounts

WEIGHTS: Final = "model.safetensors"
EVERYTHING: Final = 2**40
HEALTHY: Final = "healthy"
EARLY: Final = 16384
"""A page of the first tensor. The last page of the file is of another tensor, which nobody has read by then."""

Outcome = Literal["good", "EIO", "ESTALE"]


@dataclass(frozen=True, slots=True)
class Sources:
    """The weights of the expert that faults befall, on a disk that is told what to do, and a copy of them."""

    weights: Path
    disk: FaultyFiles
    copy: Path


def truncate(sources: Sources) -> None:
    os.truncate(sources.weights, sources.weights.stat().st_size - 5000)


def write_over(sources: Sources) -> None:
    with sources.weights.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))


def delete(sources: Sources) -> None:
    sources.weights.unlink()


def replace(sources: Sources) -> None:
    other = sources.weights.with_name("other")
    other.write_bytes(sources.weights.read_bytes()[:-100] + bytes(100))
    other.replace(sources.weights)


def restore(sources: Sources) -> None:
    shutil.copy(sources.copy, sources.weights)


def fail(sources: Sources) -> None:
    sources.disk.set(fail_from=0, fail_to=EVERYTHING)


def forbid(sources: Sources) -> None:
    """Refuse to open the file, as after a loss of permissions. What is open stays open."""
    sources.disk.set(refused=errno.EACCES)


def heal(sources: Sources) -> None:
    sources.disk.set()


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a source, how it is repaired, and what comes of reading before it is.

    ``at_open`` is what who opens the merged file afterwards gets, and ``opened`` who has it open and has read of it.
    Where the source is another file after the repair, the recipe has to be touched, which is what the log says.
    """

    happens: Callable[[Sources], None]
    repair: Callable[[Sources], None]
    at_open: Outcome
    opened: Outcome
    said: str
    another: bool = False


FAULTS: Final = {
    "EIO": Fault(fail, heal, "EIO", "EIO", "Input/output error; check the disk that it lies on"),
    "permissions": Fault(forbid, heal, "EIO", "good", "Permission denied; check its permissions"),
    "truncation": Fault(
        truncate, restore, "ESTALE", "ESTALE", "changed since|was written to since|ends before", another=True
    ),
    "overwriting": Fault(write_over, restore, "ESTALE", "ESTALE", "changed since|was written to since", another=True),
    "deletion": Fault(delete, restore, "ESTALE", "good", "is gone since the plan was made; restore it", another=True),
    "replacement": Fault(replace, restore, "ESTALE", "good", "changed since the plan was made", another=True),
}


@dataclass(frozen=True, slots=True)
class Models:
    """Merges in one mount, of which HEALTHY has nothing of the expert that faults befall."""

    mount: Mount
    recipes: Path
    sources: Sources
    expected: dict[str, bytes] = field(repr=False)

    def weights(self, name: str) -> Path:
        """Return the merged weights of a model."""
        return self.mount.mountpoint / name / WEIGHTS

    def read(self, name: str) -> bytes:
        """Return the merged weights as the server gives them, and not what the kernel has of them."""
        with self.weights(name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()

    def is_right(self, name: str) -> bool:
        """Return whether a model is served as it must be; it may be planned anew at this moment."""
        try:
            return self.read(name) == self.expected[name]
        except OSError as error:
            assert error.errno in (errno.ESTALE, errno.EIO, errno.ENOENT)
            return False

    def check_that_nobody_else_is_harmed(self) -> None:
        """Check that the server is well and that the other model is."""
        entry = find_mount(self.mount.mountpoint)
        assert entry is not None
        assert state(entry) == "live"
        assert read_status(entry)["pid"] == self.mount.pid
        assert self.is_right(HEALTHY)

    def repair(self, fault: Fault) -> None:
        """Do what the log says that is to be done."""
        records = [line for line in self.mount.log().splitlines() if f"expert-1/{WEIGHTS}: " in line]
        assert records
        assert all(REMEDY.search(record) for record in records)
        fault.repair(self.sources)
        if fault.another:
            for recipe in self.recipes.iterdir():
                os.utime(recipe)


@pytest.fixture(scope="module")
def family_of_two(tmp_path_factory: pytest.TempPathFactory) -> Family:
    shape = {"hidden": 128, "layers": 1, "vocabulary": 4500}
    directory = tmp_path_factory.mktemp("models")
    return family(directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1, **shape)


@contextmanager
def models_on(family_of_two: Family, directory: Path, faulty: bool, *names: str) -> Iterator[Models]:
    """Mount recipes: over a disk that can fail, or over sources that can be changed. HEALTHY is one more."""
    place = directory / "models"
    shutil.copytree(family_of_two.base.parent, place)
    with faulty_files(place, directory / "disk") as disk:
        expert = (disk.path if faulty else place) / "expert-1"
        expected = {}
        for number, name in enumerate((HEALTHY, *names)):
            merge = Merge("task_arithmetic", ({"weight": 0.5 + 0.125 * number},))
            models = Family(place / "base", (expert if number else place / "expert-2",))
            recipe = write_recipe(directory / "recipes" / f"{name}.yml", merge, models)
            with mergefs.open(recipe) as model:
                expected[name] = model.read_file(WEIGHTS)
        copy = family_of_two.experts[0] / WEIGHTS
        with mounted_recipes(directory / "recipes", mountpoint=directory / "mnt", state=directory / "state") as mount:
            yield Models(mount, directory / "recipes", Sources(place / "expert-1" / WEIGHTS, disk, copy), expected)


_MAP: Final = """
import hashlib, mmap, sys
path, early = sys.argv[1], int(sys.argv[2])
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    mapping.madvise(mmap.MADV_RANDOM)
    print(hashlib.sha256(mapping[early:early + 4096]).hexdigest(), flush=True)
    sys.stdin.readline()
    print(hashlib.sha256(mapping[early:early + 4096]).hexdigest(), flush=True)
    print(hashlib.sha256(mapping[-4096:]).hexdigest(), flush=True)
"""


@contextmanager
def mapping(models: Models, name: str) -> "Iterator[subprocess.Popen[str]]":
    """Give a process that has mapped a model and read a page of it; it goes on when it is sent a line."""
    with subprocess.Popen(
        [sys.executable, "-c", _MAP, models.weights(name), str(EARLY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == digest(models.expected[name][EARLY : EARLY + 4096])
        yield process


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", FAULTS)
def test_a_source_fails(family_of_two: Family, tmp_path: Path, name: str) -> None:
    """Before its merge is opened, while it is read, and while it is mapped."""
    fault = FAULTS[name]
    moments = ("before", "read", "mapped")
    with models_on(family_of_two, tmp_path, not fault.another, *moments) as models:
        models.mount.allowed.append(rf"expert-1/{WEIGHTS}: .*({fault.said})")
        check_before(models, fault)
        models.repair(fault)
        if fault.another:
            wait_for(lambda: not any(is_stale(models.weights(moment)) for moment in moments), "the repaired models")
        check_opened(models, fault)
        models.repair(fault)
        for moment in moments:
            wait_for(lambda: models.is_right(moment), f"the repaired model {moment!r}")  # noqa: B023
        models.check_that_nobody_else_is_harmed()


def is_stale(path: Path) -> bool:
    """Return whether a file cannot be opened since its sources have changed."""
    try:
        path.open("rb").close()
    except OSError as error:
        assert error.errno in (errno.ESTALE, errno.ENOENT)
        return True
    return False


def check_before(models: Models, fault: Fault) -> None:
    """Let the fault happen, and open a model of which nothing has been read."""
    fault.happens(models.sources)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            models.read("before")
        assert errno.errorcode[caught.value.errno or 0] == fault.at_open
    assert models.weights("before").stat().st_size == len(models.expected["before"])
    assert f"answered {fault.at_open}" in models.mount.log()
    models.check_that_nobody_else_is_harmed()


def check_opened(models: Models, fault: Fault) -> None:
    """Let the fault happen to two models that are open, and read on.

    A page of a mapping that cannot be had kills who wants it: there is no other way to tell. What was read stays.
    """
    early, late = slice(EARLY, EARLY + 4096), slice(-4096, None)
    expected = models.expected["read"]
    of_mapping = [digest(models.expected["mapped"][page]) for page in (early, late)]
    with mapping(models, "mapped") as process, models.weights("read").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, EARLY) == expected[early]
        fault.happens(models.sources)
        if fault.opened == "good":
            assert os.pread(file.fileno(), 4096, len(expected) - 4096) == expected[late]
        else:
            with pytest.raises(OSError) as caught:
                os.pread(file.fileno(), 4096, len(expected) - 4096)
            assert errno.errorcode[caught.value.errno or 0] == fault.opened
        assert os.pread(file.fileno(), 4096, EARLY) == expected[early]
        said = process.communicate("go on\n", timeout=DEADLINE)[0].split()
        if fault.opened == "good":
            assert (process.returncode, said) == (0, of_mapping)
        else:
            assert (process.returncode, said) == (-signal.SIGBUS, of_mapping[:1])
    models.check_that_nobody_else_is_harmed()


def test_an_error_of_a_disk_that_passes_kills_nobody(family_of_two: Family, tmp_path: Path) -> None:
    with models_on(family_of_two, tmp_path, True, "first") as models, mapping(models, "first") as process:
        models.mount.allowed.append("Input/output error; check the disk that it lies on; trying again")
        models.sources.disk.set(fail_from=0, fail_to=EVERYTHING, times=2)
        said = process.communicate("go on\n", timeout=DEADLINE)[0].split()
        assert (process.returncode, said[1]) == (0, digest(models.expected["first"][-4096:]))
        assert models.mount.log().count("trying again") == 2
        models.check_that_nobody_else_is_harmed()


def test_what_was_repaired_is_shown_anew_also_where_its_content_is_known(
    family_of_two: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan then has the same name as the one whose source is gone, and is another one all the same."""
    monkeypatch.setenv("MERGEFS_CATALOG", str(tmp_path / "catalog"))
    with models_on(family_of_two, tmp_path, False, "first") as models:
        models.mount.allowed += ["is gone since the plan was made", "changed since"]
        recipe = models.recipes / "first.yml"
        for _ in range(2):
            analyzed = run_mergefs("analyze", recipe, state=tmp_path / "state")
            assert analyzed.returncode == 0, analyzed.stderr
            os.utime(recipe)
            wait_for(lambda: models.is_right("first"), "the model")
            delete(models.sources)
            with pytest.raises(OSError) as caught:
                models.read("first")
            assert caught.value.errno == errno.ESTALE
            restore(models.sources)


# The server -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_under_readers_is_an_error_for_all_and_is_mounted_anew(
    family_of_two: Family, tmp_path: Path
) -> None:
    state_directory = tmp_path / "state"
    with models_on(family_of_two, tmp_path, True, "first") as models:
        models.sources.disk.set(delay=0.05)
        mount, failed = models.mount, []

        def read_on() -> None:
            try:
                while True:
                    models.read("first")
            except OSError as error:
                failed.append(error.errno)

        readers = [threading.Thread(target=read_on) for _ in range(4)]
        with mapping(models, "first") as process:
            for reader in readers:
                reader.start()
            entry = find_mount(mount.mountpoint)
            assert entry is not None
            wait_for(lambda: int(str(read_status(entry)["bytes_served"])) > 2**20, "readers at work")
            mount.kill(signal.SIGKILL)
            assert mount.wait() == -signal.SIGKILL
            for reader in readers:
                reader.join(DEADLINE)
            assert len(failed) == 4
            assert set(failed) <= {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
            process.communicate("go on\n", timeout=DEADLINE)
            assert process.returncode == -signal.SIGBUS
        with pytest.raises(OSError) as caught:
            models.weights(HEALTHY).stat()
        assert caught.value.errno == errno.ENOTCONN

        (report,) = json.loads(run_mergefs("status", mount.mountpoint, "--json", state=state_directory).stdout)
        assert report["state"] == "crashed"
        assert run_mergefs("umount", mount.mountpoint, state=state_directory).returncode == 0
        assert find_mount(mount.mountpoint) is None
        models.sources.disk.set()
        with mounted_recipes(models.recipes, mountpoint=mount.mountpoint, state=tmp_path / "again"):
            for name, content in models.expected.items():
                assert models.read(name) == content
        mount.exit_status = 0
        assert not is_running(mount.pid)
