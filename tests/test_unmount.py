"""Taking mounts away, losing their servers, and asking how they are."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tree import BIG_SIZE, FILES, pattern
from mounting import (
    DEADLINE,
    Mount,
    fake_mount,
    holder,
    is_running,
    reader,
    run_fake,
    run_mergefs,
    server_pid,
    start_fake_server,
    wait_for,
)

from mergefs.errors import MountError
from mergefs.mount.mountinfo import find_mount, state
from mergefs.mount.unmount import unmount

pytestmark = pytest.mark.mounts

# -- by command -------------------------------------------------------------------------------------------------------


def test_unmounting_by_command_waits_for_the_server(directory: Path) -> None:
    with fake_mount(directory) as mount:
        result = run_mergefs("umount", mount.mountpoint, state=directory / "state")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert not is_running(mount.pid)
        assert (mount.control / "closed").exists()
        assert find_mount(mount.mountpoint) is None


def test_a_busy_mount_stays_and_its_holders_are_named(directory: Path) -> None:
    with fake_mount(directory) as mount, holder(mount.mountpoint / "config.json") as process:
        result = run_mergefs("umount", mount.mountpoint, state=directory / "state")
        assert result.returncode == 1
        assert f"python (pid {process.pid}, an open file {mount.mountpoint}/config.json)" in result.stderr
        assert "--lazy" in result.stderr
        assert result.stderr.count("\n") == 1
        assert (mount.mountpoint / "config.json").read_bytes() == FILES["/config.json"]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.chdir(path + '/sub')", "its working directory {path}/sub"),
        (
            "import mmap; f = open(path + '/big.bin'); m = mmap.mmap(f.fileno(), 0, prot=1); f.close()",
            "a mapped file {path}/big.bin",
        ),
    ],
)
def test_a_mount_can_be_held_without_an_open_file(directory: Path, code: str, how: str) -> None:
    with fake_mount(directory) as mount:
        program = f"import os, sys; path = sys.argv[1]\n{code}\nos.closerange(3, 100); print('held', flush=True)\n"
        with subprocess.Popen(
            [sys.executable, "-c", program + "sys.stdin.read()", mount.mountpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(MountError) as caught:
                unmount(mount.mountpoint)
            assert f"(pid {process.pid}, {how.format(path=mount.mountpoint)})" in str(caught.value)


def test_a_busy_mount_is_taken_away_lazily_and_its_reader_goes_on(directory: Path) -> None:
    with fake_mount(directory) as mount:
        with (mount.mountpoint / "big.bin").open("rb") as file:
            result = run_mergefs("umount", "--lazy", mount.mountpoint, state=directory / "state")
            assert (result.returncode, result.stderr) == (0, "")
            assert find_mount(mount.mountpoint) is None
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == pattern(0, BIG_SIZE)
            assert is_running(mount.pid)
        assert mount.wait() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a mount namespace")
def test_a_server_that_another_namespace_keeps_alive_is_no_riddle(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container does that is started while the mount is there."""
    monkeypatch.setattr("mergefs.mount.unmount._SERVER_DEADLINE", 0.1)
    with fake_mount(directory) as mount:
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            with pytest.raises(
                MountError, match=r"is unmounted, but .* another mount namespace, such as a container's"
            ):
                unmount(mount.mountpoint)
            assert find_mount(mount.mountpoint) is None
            assert is_running(mount.pid)
        assert mount.wait() == 0


@pytest.mark.parametrize("arguments", [[], ["--lazy"]])
def test_what_is_not_a_mount_of_mergefs_is_left_alone(directory: Path, arguments: list[str]) -> None:
    result = run_mergefs("umount", directory, *arguments, state=directory / "state")
    assert (result.returncode, result.stdout) == (1, "")
    assert "is not a mount point" in result.stderr
    result = run_mergefs("umount", "/proc", *arguments, state=directory / "state")
    assert result.returncode == 1
    assert "/proc is a mount of type proc, not of mergefs" in result.stderr


# -- crashes ----------------------------------------------------------------------------------------------------------


def crash(mount: Mount) -> None:
    """Kill the server so that its mount stays."""
    mount.kill(signal.SIGKILL)
    assert mount.wait() == -signal.SIGKILL


def test_a_crashed_mount_is_recognised_cleared_and_mounted_anew(directory: Path) -> None:
    starter = start_fake_server(directory)
    assert starter.communicate(timeout=DEADLINE)[1] == b"building the tree\n"
    mount = Mount(directory / "mnt", server_pid(directory), directory / "none.log", directory / "control")
    crash(mount)
    entry = find_mount(mount.mountpoint)
    assert entry is not None
    assert state(entry) == "crashed"

    status = run_mergefs("status", mount.mountpoint, state=directory / "state")
    assert status.returncode == 0
    assert "crashed" in status.stdout
    assert f"mergefs umount {mount.mountpoint}" in status.stdout
    (report,) = json.loads(run_mergefs("status", mount.mountpoint, "--json", state=directory / "state").stdout)
    assert (report["mountpoint"], report["state"]) == (str(mount.mountpoint), "crashed")

    assert run_fake(directory) == (
        1,
        [
            f"mergefs: error: {mount.mountpoint} is a crashed mount whose server is gone; "
            f"run `mergefs umount {mount.mountpoint}` to clear it"
        ],
    )
    assert run_mergefs("umount", mount.mountpoint, state=directory / "state").returncode == 0
    assert find_mount(mount.mountpoint) is None
    with fake_mount(directory) as again:
        assert (again.mountpoint / "config.json").read_bytes() == FILES["/config.json"]


def test_a_crashed_mount_is_cleared_even_while_somebody_holds_it(directory: Path) -> None:
    assert run_fake(directory)[0] == 0
    mount = Mount(directory / "mnt", server_pid(directory), directory / "none.log", directory / "control")
    with holder(mount.mountpoint / "config.json"):
        crash(mount)
        unmount(mount.mountpoint)
        assert find_mount(mount.mountpoint) is None


def test_a_crash_during_a_read_is_an_error_for_the_reader(directory: Path) -> None:
    assert run_fake(directory)[0] == 0
    mount = Mount(directory / "mnt", server_pid(directory), directory / "none.log", directory / "control")
    client = reader(mount.mountpoint / "slow.bin")
    wait_for((mount.control / "reading").exists, "a read in flight")
    crash(mount)
    assert client.communicate(timeout=DEADLINE)[0].startswith(b"failed with ")
    unmount(mount.mountpoint)


# -- status -----------------------------------------------------------------------------------------------------------


def test_status_tells_programs_everything_about_each_mount(directory: Path) -> None:
    with fake_mount(directory) as mount:
        result = run_mergefs("status", "--json", state=directory / "state")
        reports = {report["mountpoint"]: report for report in json.loads(result.stdout)}
        report = reports[str(mount.mountpoint)]
        assert (report["pid"], report["state"]) == (mount.pid, "live")
        assert {
            "recipes",
            "plan_ids",
            "expert_bytes_read",
            "base_bytes_read",
            "analysis_bytes_read",
            "bytes_served",
            "cache_bytes",
            "cache_hits",
            "cache_misses",
            "uptime_s",
        } <= report.keys()


def test_status_shows_people_a_table_with_sizes_they_can_read(directory: Path) -> None:
    with fake_mount(directory) as mount:
        result = run_mergefs("status", mount.mountpoint, state=directory / "state")
        header, row = result.stdout.splitlines()
        assert header.split()[:2] == ["Mount", "Recipes"]
        for cell in (str(mount.mountpoint), "ties.yml", "2.00 KiB", "1.00 MiB", "75 %", str(mount.pid)):
            assert cell in row


def test_status_of_what_is_no_mount_is_an_error(directory: Path) -> None:
    result = run_mergefs("status", directory, state=directory / "state")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{directory} is not a mount point" in result.stderr


def test_status_does_not_wait_for_a_stopped_server(directory: Path) -> None:
    with fake_mount(directory) as mount:
        with mount.stopped():
            result = run_mergefs("status", mount.mountpoint, state=directory / "state")
        assert result.returncode == 0
        assert "does not answer" in result.stdout


def test_a_stopped_server_is_left_to_a_lazy_unmount(directory: Path) -> None:
    with fake_mount(directory) as mount:
        with mount.stopped():
            with pytest.raises(MountError, match="does not answer, so that it cannot be asked to end"):
                unmount(mount.mountpoint)
            assert find_mount(mount.mountpoint) is not None
            unmount(mount.mountpoint, lazy=True)
            assert find_mount(mount.mountpoint) is None
        assert mount.wait() == 0
