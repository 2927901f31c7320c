"""A mount under load: many readers at once, some of them killed, over a slow disk; without memory; on a full disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from load_reader import WEIGHTS
from mount_load import CACHE, IDLE_THREADS, SOURCE_FILES, VARIANTS, LoadedModels, Server, load, loaded_models
from mounting import DEADLINE, Mount, environment, mounted_recipes, run_mergefs, wait_for

from mergefs.catalog import Catalog
from mergefs.mount.kernel_window import KERNEL_WINDOW
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.unmount import read_status, unmount

pytestmark = pytest.mark.mounts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModels]:
    with loaded_models(tmp_path_factory.mktemp("load"), delay=0.005) as made:
        yield made


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.heavy)])
def test_many_processes_read_random_pages_of_many_variants(
    models: LoadedModels, tmp_path: Path, seconds: float
) -> None:
    """In five seconds, nearly all find tensors that nobody has read before; later most have been."""
    figures = load(models, tmp_path, seconds, readers=16, threads=4)
    print(figures)
    assert figures.failures == []


@contextmanager
def mounted(models: LoadedModels, directory: Path, delay: float = 0.0, cache: int = CACHE) -> Iterator[Mount]:
    """Mount the recipes on a disk of which each read takes ``delay`` seconds."""
    models.disk.set("*", delay=delay)
    options = ["--cache-size", str(cache)]
    with mounted_recipes(
        models.recipes, mountpoint=directory / "mnt", state=directory / "state", options=options
    ) as mount:
        yield mount


def fresh(path: Path) -> bytes:
    """Return what a file has as its server says, and not as the kernel remembers."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def check_variants(models: LoadedModels, mount: Mount) -> None:
    for variant in VARIANTS:
        assert fresh(mount.mountpoint / variant / WEIGHTS) == (models.expected / variant / WEIGHTS).read_bytes()


# Readers that are killed ----------------------------------------------------------------------------------------------


def served(mount: Mount, name: str) -> int:
    entry = find_mount(mount.mountpoint)
    assert entry is not None
    return int(str(read_status(entry, DEADLINE)[name]))


_FAULT: Final = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    mapping[int(sys.argv[2])]
"""


_DELAY: Final = 0.3
"""Seconds of each read of a source, so that a reader is killed while it waits."""


def test_a_reader_that_is_killed_in_a_page_fault_leaves_nothing_behind(models: LoadedModels, tmp_path: Path) -> None:
    with mounted(models, tmp_path, delay=_DELAY) as mount:
        server, path = Server(mount.pid), mount.mountpoint / "arithmetic" / WEIGHTS
        path.stat()
        descriptors = server.descriptors
        for part in range(1, 4):  # each where nothing has been computed so far
            place = path.stat().st_size * part // 4
            misses = served(mount, "cache_misses")
            with subprocess.Popen([sys.executable, "-c", _FAULT, path, str(place)]) as reader:
                wait_for(lambda: served(mount, "cache_misses") > misses, "a read that has begun")  # noqa: B023
                reader.kill()
            assert reader.returncode == -signal.SIGKILL
            models.disk.set("*", delay=0.0)
            with path.open("rb", buffering=0) as file:  # until nothing is left of what was asked for around the place
                os.pread(file.fileno(), 2 * KERNEL_WINDOW, place - KERNEL_WINDOW)
            models.disk.set("*", delay=_DELAY)
        models.disk.set("*", delay=0.0)
        assert fresh(path) == (models.expected / "arithmetic" / WEIGHTS).read_bytes()
        wait_for(lambda: server.threads <= IDLE_THREADS, "the server's threads to end")
        assert server.descriptors <= descriptors + SOURCE_FILES
        unmount(mount.mountpoint)  # nobody holds it


# Ends under load ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["a signal", "umount --lazy"])
def test_a_server_ends_though_readers_are_at_work(models: LoadedModels, tmp_path: Path, way: str) -> None:
    """Those that have a file open when it goes go on to the end of that, or get an error; nobody waits forever."""
    with mounted(models, tmp_path, delay=0.005) as mount, ThreadPoolExecutor(8) as pool:

        def read_on(variant: str) -> str:
            while True:
                try:
                    found = fresh(mount.mountpoint / variant / WEIGHTS)
                except OSError:
                    return "ended"
                if found != (models.expected / variant / WEIGHTS).read_bytes():
                    return "wrong bytes"

        readers = [pool.submit(read_on, variant) for variant in VARIANTS]
        wait_for(lambda: served(mount, "bytes_served") > 2**20, "readers at work")
        if way == "a signal":
            mount.kill(signal.SIGTERM)
        else:
            unmount(mount.mountpoint, lazy=True)
        assert [reader.result(DEADLINE) for reader in readers] == ["ended"] * 8
        assert mount.wait() == 0
        assert find_mount(mount.mountpoint) is None


# Without memory -------------------------------------------------------------------------------------------------------


_READ_IN_LITTLE_MEMORY: Final = """
import logging, pathlib, resource, sys
from mergefs.catalog import Catalog
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.workspace import Workspace
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.targets import recipe_target
name, catalog, recipes, expected, *variants = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
workspace = Workspace.create(Catalog(pathlib.Path(catalog)), 2**30)
models = []
for variant in variants:
    recipe, changes = (variant + "@").split("@")[:2]
    target = pathlib.Path(recipes, recipe + ".yml" + ("@" + changes if changes else ""))
    recipe, options = recipe_target(target, PlanOptions(), workspace.catalog)
    models.append(ModelFiles(make_plan(recipe, options, workspace), workspace, strict=False))
    models[-1].engine.prepare()
    models[-1].read(name, 0, 2**17)
contents = [memoryview(pathlib.Path(expected, variant, name).read_bytes()) for variant in variants]
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, resource.RLIM_INFINITY))
for model, content in zip(models, contents):  # from here on nothing but the reads takes memory
    for offset in range(0, len(content), 2**17):
        assert model.read(name, offset, 2**17) == content[offset:offset + 2**17]
print("all is right")
"""


def test_who_has_no_memory_left_gives_up_the_cache_before_the_read(models: LoadedModels, tmp_path: Path) -> None:
    """Of a process that may take 24 MiB more than it has, for the fifty of four models."""
    models.disk.set()
    places = (WEIGHTS, tmp_path / "catalog", models.recipes, models.expected)
    done = subprocess.run(
        [sys.executable, "-c", _READ_IN_LITTLE_MEMORY, *map(str, places), *VARIANTS[4:7], VARIANTS[0]],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    *warnings, last = done.stdout.splitlines()
    assert last == "all is right"
    assert warnings
    assert all("there is no memory left: " in warning for warning in warnings)


# Without a disk to write to -------------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Give a directory on a disk of its own, of which all is let go at the end."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill(disk: Path) -> None:
    """Leave no byte of a disk."""
    with pytest.raises(OSError, match="No space left"), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_for_logs_and_temporary_files_harms_no_reader(models: LoadedModels, tmp_path: Path) -> None:
    models.disk.set()
    with small_disk(tmp_path / "full", "64k") as disk:
        fill(disk)
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        extra = {"TMPDIR": str(disk), "XDG_CACHE_HOME": str(disk / "cache")}
        done = run_mergefs("mount", models.recipes, mountpoint, state=disk / "state", extra=extra)
        try:
            (log,) = (disk / "state" / "mergefs" / "log").iterdir()
            said = f"mergefs: warning: cannot write the log file {log}: No space left on device; free some space"
            assert (done.returncode, done.stdout) == (0, "")
            assert done.stderr.startswith(said)
            assert done.stderr.count("\n") == 1
            for variant in VARIANTS[:5]:
                assert fresh(mountpoint / variant / WEIGHTS) == (models.expected / variant / WEIGHTS).read_bytes()
            with pytest.raises(FileNotFoundError):  # which writes to the log
                (mountpoint / "ties@colour=3").stat()
        finally:
            assert run_mergefs("umount", mountpoint, state=tmp_path / "state").returncode == 0


def test_a_full_disk_for_the_catalog_harms_no_reader(
    models: LoadedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found out of tensors, and the plans of variants, are not kept then; and are again when there is room."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        monkeypatch.setenv("MERGEFS_CATALOG", str(disk / "catalog"))
        with mounted(models, tmp_path) as mount:
            mount.allowed.append("what is found out is not kept: .*No space left on device.*free some space")
            fill(disk)
            check_variants(models, mount)
            assert mount.log().count("what is found out is not kept") == 1
            (disk / "filler").unlink()
            variants = [mount.mountpoint / name for name in (VARIANTS[-1], "ties@density=0.25")]
            lost, kept = (os.getxattr(variant, "user.mergefs.plan_id").decode() for variant in variants)
            assert mount.log().count("what is found out is not kept") == 1
        with Catalog(disk / "catalog") as catalog:
            assert catalog.plan(lost) is None
            assert catalog.plan(kept) is not None


# Opens and closes -----------------------------------------------------------------------------------------------------

_OPEN_AND_CLOSE: Final = """
import mmap, os, sys
times, *paths = sys.argv[1:]
for number in range(int(times)):
    descriptor = os.open(paths[number % len(paths)], os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    if number % 3 == 1:
        os.pread(descriptor, 4096, number * 4096 % size)
    if number % 3 == 2:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapping:
            mapping[number * 4096 % size]
    if number % 100 == 0:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
"""

LEAK: Final = 400
"""Bytes for each open by which memory may differ. Beside what leaks it differs by up to 7 MB: for as many requests as a
server has ever had at once it keeps memory, and when that is depends on what else the machine does."""

OPENS: Final = 30_000
"""So many that the least leak that is looked for is more than that."""


def test_thirty_thousand_opens_and_closes_leave_nothing_behind(models: LoadedModels, tmp_path: Path) -> None:
    """With room for all that is computed: blocks that come and go change memory by more than what is looked for."""
    with mounted(models, tmp_path, cache=4 * CACHE) as mount:
        server = Server(mount.pid)
        paths = [mount.mountpoint / variant / WEIGHTS for variant in VARIANTS[:5]]

        def open_and_close(times: int) -> int:
            """Let four programs do it together, and return the bytes that the server takes afterwards."""
            command = [sys.executable, "-c", _OPEN_AND_CLOSE, str(times // 4), *map(str, paths)]
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(subprocess.run, command, check=True) for _ in range(4)]:
                    done.result()
            wait_for(lambda: server.threads <= IDLE_THREADS, "the server's threads to end")
            return server.memory()

        for path in paths:
            fresh(path)
        before = open_and_close(10_000)  # until all threads and pools of memory are there
        descriptors, misses = server.descriptors, served(mount, "cache_misses")
        grown = open_and_close(OPENS) - before
        print(f"{OPENS} opens: {grown} bytes more memory, {server.descriptors - descriptors} more descriptors")
        assert served(mount, "cache_misses") == misses  # nothing was computed meanwhile
        assert server.descriptors <= descriptors
        assert grown <= OPENS * LEAK
        unmount(mount.mountpoint)  # nothing is open
