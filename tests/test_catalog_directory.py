"""Where a catalog lies and who has it open: forks, dead readers, removed files, file systems that cannot hold it."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import family
from mounting import environment, run_mergefs, wait_for
from recipes import MERGES, write_recipe

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.catalog import directory as directory_module
from mergefs.catalog import environment as environment_module
from mergefs.catalog.directory import Users, alone, mounted_type
from mergefs.catalog.records import ContentRecord
from mergefs.errors import CatalogError
from mergefs.mount.mountinfo import find_mount

HOLD = (
    "import sys; from pathlib import Path; from mergefs.catalog import Catalog\n"
    "catalog = Catalog(Path(sys.argv[1]))\n"
    "reading = catalog._environment._lmdb.begin()\n"
    "reading.stat(catalog._environment._tables['numbers'])\n"
    "print('open', flush=True)\n"
    "sys.stdin.read()\n"
)


@contextmanager
def another_process(catalog: Path) -> Iterator["subprocess.Popen[str]"]:
    """Have another process keep a catalog open, in the middle of a read, until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(catalog)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(catalog.parent),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def place(catalogs: Path, tmp_path: Path) -> Path:
    """A directory for a catalog, in memory, that is not there yet."""
    return catalogs / f"{tmp_path.name}-catalog"


def ties(directory: Path) -> Path:
    models = family(directory / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    return write_recipe(directory / "ties.yml", MERGES["ties"], models)


# Processes ------------------------------------------------------------------------------------------------------------


def test_a_process_may_open_its_catalog_as_often_as_it_likes(place: Path) -> None:
    first, second = Catalog(place), Catalog(place)
    first.keep_number(b"n" * 24, 1.0)
    first.close()
    assert second.number(b"n" * 24) == 1.0
    second.keep_number(b"m" * 24, 2.0)
    second.close()
    with Catalog(place) as again:
        assert again.number(b"m" * 24) == 2.0


def test_two_models_may_be_open_at_once(tmp_path: Path) -> None:
    recipe = ties(tmp_path)
    with open_model(recipe) as first, open_model(recipe, budget="50%") as second:
        for model in (first, second):
            assert model.read_file("model.safetensors")


def test_a_catalog_that_was_opened_before_a_fork_is_refused_after_it(place: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mergefs.catalog import Catalog\n"
        "from mergefs.errors import CatalogError\n"
        "catalog = Catalog(Path(sys.argv[1]))\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        catalog.counts()\n"
        "    except CatalogError as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "catalog.keep_number(b'n' * 24, 3.0)\n"
        "catalog.close()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        env=environment(place.parent),
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.startswith(f"{place}: the catalog was opened before this process forked")
    with Catalog(place) as catalog:
        assert catalog.number(b"n" * 24) == 3.0


def test_the_server_of_a_mount_opens_the_catalog_and_who_starts_it_does_not(directory: Path, place: Path) -> None:
    """As the kernel sees it: the process that forks the server never opens the data file."""
    mountpoint, log = directory / "mount", directory / "trace"
    mountpoint.mkdir()
    mergefs = [sys.executable, "-m", "mergefs.cli", "--catalog", place, "mount", ties(directory), mountpoint]
    tracing = ["strace", "-f", "-e", "trace=openat,clone,clone3,fork,vfork", "--signal=none", "-o", log]
    with subprocess.Popen([*tracing, *mergefs], env=environment(directory), stdin=subprocess.DEVNULL) as tracer:
        wait_for(lambda: find_mount(mountpoint) is not None, "the mount")
        assert run_mergefs("umount", mountpoint, state=directory).returncode == 0
        assert tracer.wait(timeout=60) == 0
    lines = log.read_text().splitlines()
    opened = [number for number, line in enumerate(lines) if "openat" in line and f'{place}/data.mdb"' in line]
    servers = {lines[number].split()[0] for number in opened}
    forks = [line for line in lines if "SIGCHLD" in line and re.search(r"(clone|fork).*= \d+$", line)]
    starter = lines[0].split()[0]
    assert servers
    assert starter not in servers
    assert servers <= {line.split()[-1] for line in forks if line.split()[0] == starter}
    assert not [line for line in lines[min(opened) :] if line in forks and line.split()[0] in servers]


def test_the_place_of_a_reader_that_was_killed_is_cleared_when_the_catalog_is_opened(place: Path) -> None:
    with another_process(place) as process, Catalog(place) as catalog:
        readers = catalog._environment._lmdb.readers
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert str(process.pid) in readers()
        assert run_mergefs("--catalog", place, "catalog", "info", state=place.parent).returncode == 0
        assert str(process.pid) not in readers()


def test_pages_that_a_killed_reader_kept_are_used_again_by_a_process_that_was_there_before_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_module, "_INITIAL_MAP", 2**20)
    with Catalog(place) as catalog:
        with another_process(place) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
            for number in range(40):
                catalog.keep_content(b"c" * 24, ContentRecord(b"", bytes([number]) * 200_000))
                catalog.flush()
        assert catalog._environment._lmdb.info()["map_size"] <= 2 * 2**20


# Files that are gone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb"])
def test_a_file_that_is_removed_while_others_have_it_open_is_not_made_anew(place: Path, name: str) -> None:
    with another_process(place) as process:
        (place / name).unlink()
        with pytest.raises(CatalogError, match=rf"{name} was removed while process {process.pid} had the catalog open"):
            Catalog(place)
        assert not (place / name).exists()
    Catalog(place).close()


@pytest.mark.parametrize("names", [["lock.mdb"], ["users.lock"], ["lock.mdb", "users.lock"]])
def test_lock_files_are_made_anew_and_nothing_is_lost(place: Path, names: list[str]) -> None:
    with Catalog(place) as catalog:
        catalog.keep_number(b"n" * 24, 1.0)
    for name in names:
        (place / name).unlink()
    with Catalog(place) as catalog:
        assert catalog.number(b"n" * 24) == 1.0


def test_a_process_waits_while_another_has_the_catalog_for_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Catalog(place).close()
    with ThreadPoolExecutor(1) as pool:
        with alone(place) as is_alone:
            assert is_alone
            waiting = pool.submit(Catalog, place)
            assert not wait([waiting], timeout=0.1).done
        waiting.result(timeout=60).close()
    monkeypatch.setattr(directory_module, "_WAITING_DEADLINE", 0.0)
    with (
        alone(place),
        pytest.raises(CatalogError, match=f"{place}: .* has the catalog for itself .*; wait for it, or stop it"),
    ):
        Catalog(place)


def test_nobody_is_alone_with_a_catalog_that_is_open(place: Path) -> None:
    with another_process(place) as process:
        with alone(place) as is_alone:
            assert not is_alone
        users = Users(place)
        assert users.others() == (process.pid,)
        users.close()


# File systems ---------------------------------------------------------------------------------------------------------


def test_a_file_system_that_is_mounted_read_only_gets_one_sentence(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=True)
    try:
        for place in (disk, disk / "catalog"):
            with pytest.raises(
                CatalogError,
                match=rf"{place}: the catalog cannot be opened \(Read-only file system\); make it writable",
            ):
                Catalog(place)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_the_user_may_not_write_to_gets_one_sentence(tmp_path: Path) -> None:
    place = tmp_path / "catalog"
    Catalog(place).close()
    (tmp_path / "closed").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path; from mergefs.catalog import Catalog\n"
        "from mergefs.errors import CatalogError\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for place in ('catalog', 'closed/catalog'):\n"
        "    try:\n"
        "        Catalog(Path(place))\n"
        "    except CatalogError as error:\n"
        "        print(error)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert finished.stdout.splitlines() == [
        f"{place}: the catalog cannot be opened (Permission denied); make it writable, or name another directory with "
        "--catalog"
        for place in ("catalog", "closed/catalog")
    ]


@pytest.mark.parametrize(("number", "name"), [(0x6969, "nfs"), (0xFF534D42, "cifs"), (0x00C36400, "ceph")])
def test_a_network_file_system_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    monkeypatch.setattr(directory_module, "filesystem_type", lambda _: number)
    with pytest.raises(
        CatalogError,
        match=rf"lies on a network file system \({name}\).* name a directory on a local disk with --catalog",
    ):
        Catalog(tmp_path / "catalog")
    assert list(tmp_path.iterdir()) == []


def test_of_file_systems_in_user_space_those_of_the_network_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "filesystem_type", lambda _: 0x65735546)
    monkeypatch.setattr(directory_module, "mounted_type", lambda _: "fuse.sshfs")
    with pytest.raises(CatalogError, match=r"network file system \(fuse\.sshfs\)"):
        Catalog(tmp_path)
    monkeypatch.setattr(directory_module, "mounted_type", lambda _: "fuse.gocryptfs")
    Catalog(tmp_path).close()


def test_the_type_of_a_mount_is_that_of_the_innermost(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 0:5 / {tmp_path}/a\\040b rw shared:1 - fuse.sshfs host: rw\n"
        f"3 2 0:6 / {tmp_path}/a\\040b/c rw - tmpfs tmpfs rw\n"
    )
    assert mounted_type(tmp_path / "a b" / "d", table) == "fuse.sshfs"
    assert mounted_type(tmp_path / "a b" / "c" / "d", table) == "tmpfs"
    assert mounted_type(tmp_path / "other", table) == "ext4"


def test_the_system_says_what_kind_a_local_file_system_is() -> None:
    assert directory_module.filesystem_type(Path("/proc")) == 0x9FA0
    assert mounted_type(Path("/proc/self")) == "proc"
