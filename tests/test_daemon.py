"""Starting and stopping servers: real processes, real signals, real mounts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tree import FILES, pattern
from mounting import (
    DEADLINE,
    environment,
    fake_mount,
    foreground_mount,
    is_running,
    reader,
    run_fake,
    run_mergefs,
    server_pid,
    start_fake_server,
    wait_for,
)

from mergefs.errors import MountError
from mergefs.mount import bindings, mountpoint
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.mountpoint import check_mountpoint, refuse_sources_inside
from mergefs.mount.unmount import unmount

pytestmark = pytest.mark.mounts


def assert_nothing_left(directory: Path) -> None:
    """Check that neither mount nor process nor log is left of a start that failed."""
    assert find_mount(directory / "mnt") is None
    assert list((directory / "mnt").iterdir()) == []
    wait_for(lambda: not is_running(server_pid(directory)), "the end of the server")
    assert log_files(directory) == []


def log_files(directory: Path) -> list[Path]:
    """Return the log files in the user's state directory."""
    return sorted((directory / "state").rglob("*.log"))


# -- starting ---------------------------------------------------------------------------------------------------------


def test_the_command_returns_when_the_mount_answers_and_not_before(directory: Path) -> None:
    starter = start_fake_server(directory, "--build", "wait")
    wait_for((directory / "control" / "building").exists, "the server to build")
    assert starter.poll() is None
    assert find_mount(directory / "mnt") is None
    (directory / "control" / "build-on").touch()
    said = starter.communicate(timeout=DEADLINE)[1]
    assert (directory / "mnt" / "config.json").read_bytes() == FILES["/config.json"]
    assert starter.returncode == 0
    assert said == b"building the tree\n"
    unmount(directory / "mnt")


def test_the_daemon_lets_go_of_terminal_directory_and_descriptors(directory: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    with fake_mount(directory) as mount:
        process = Path(f"/proc/{mount.pid}")
        assert (process / "cwd").readlink() == Path("/")
        links = {int(link.name): str(link.readlink()) for link in (process / "fd").iterdir()}
        assert links[0] == os.devnull
        assert links[1] == links[2] == str(mount.log_file)
        assert f"pipe:[{os.fstat(writing).st_ino}]" not in links.values()
        assert os.getsid(mount.pid) == mount.pid
    os.close(reading)
    os.close(writing)


def test_any_path_can_be_a_mount_point(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode("a b,c\\d\tü".encode() + b"\xff")
    directory.mkdir()
    with fake_mount(directory) as mount:
        assert (mount.mountpoint / "config.json").read_bytes() == FILES["/config.json"]
        status = run_mergefs("status", mount.mountpoint, "--json", state=directory / "state")
        assert [report["mountpoint"] for report in json.loads(status.stdout)] == [str(mount.mountpoint)]
        assert run_mergefs("umount", mount.mountpoint, state=directory / "state").returncode == 0


def test_a_foreground_mount_can_write_a_log_file_too(directory: Path) -> None:
    with foreground_mount(directory, "--log-file", directory / "copy.log") as mount:
        assert (directory / "copy.log").read_text() == mount.log()


def test_the_log_is_by_default_a_file_of_its_own_in_the_state_directory(directory: Path) -> None:
    assert run_fake(directory) == (0, ["building the tree"])
    assert log_files(directory) == [directory / f"state/mergefs/log/mnt-{server_pid(directory)}.log"]
    unmount(directory / "mnt")
    assert "unmounted" in log_files(directory)[0].read_text()


def test_a_relative_log_file_is_relative_to_where_the_command_runs(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    assert run_fake(directory, "--log-file", "here.log") == (0, ["building the tree"])
    assert "serving" in (directory / "here.log").read_text()
    unmount(directory / "mnt")


def test_the_log_goes_to_a_temporary_directory_when_there_is_no_state_directory(directory: Path) -> None:
    (directory / "file").touch()
    extra = {"XDG_STATE_HOME": str(directory / "file"), "TMPDIR": str(directory)}
    assert run_fake(directory, extra=extra)[0] == 0
    assert [path.name for path in directory.glob("mergefs-log-*/*")] == [f"mnt-{server_pid(directory)}.log"]
    unmount(directory / "mnt")


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told_when_a_foreground_mount_answers(directory: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{directory}" if abstract else str(directory / "notify"))
        manager.settimeout(DEADLINE)
        address = f"@{directory}" if abstract else str(directory / "notify")
        with foreground_mount(directory, extra={"NOTIFY_SOCKET": address}) as mount:
            assert manager.recv(100) == b"READY=1"
            assert (mount.mountpoint / "config.json").read_bytes() == FILES["/config.json"]


@pytest.mark.parametrize(
    ("how", "status", "sentence"),
    [
        ("refuse", 1, "mergefs: error: ties.yml: line 3: unknown key 'wieght'; did you mean 'weight'?"),
        ("refuse-usage", 2, "mergefs: error: these do not fit together"),
    ],
)
def test_a_tree_that_cannot_be_built_gives_its_sentence_and_leaves_nothing(
    directory: Path, how: str, status: int, sentence: str
) -> None:
    assert run_fake(directory, "--build", how) == (status, ["building the tree", sentence])
    assert_nothing_left(directory)


def test_a_foreground_mount_fails_with_the_same_sentence(directory: Path) -> None:
    status, said = run_fake(directory, "--foreground", "--build", "refuse")
    assert (status, said[-1]) == (1, "mergefs: error: ties.yml: line 3: unknown key 'wieght'; did you mean 'weight'?")


def test_a_bug_in_the_server_is_one_sentence_that_names_the_log(directory: Path) -> None:
    status, said = run_fake(directory, "--build", "break")
    (log,) = log_files(directory)
    assert status == 1
    assert len(said) == 2
    assert "internal error" in said[1]
    assert "division by zero" in said[1]
    assert str(log) in said[1]
    assert "Traceback" in log.read_text()
    assert find_mount(directory / "mnt") is None


def test_a_server_that_dies_without_a_word_is_reported_with_its_log(directory: Path) -> None:
    status, said = run_fake(directory, "--build", "die")
    assert status == 1
    assert "was killed by SIGKILL before the mount was ready" in said[1]
    assert str(log_files(directory)[0]) in said[1]
    assert find_mount(directory / "mnt") is None


def test_a_server_that_leaves_without_a_mount_is_a_failure(directory: Path) -> None:
    status, said = run_fake(directory, "--build", "exit")
    assert status == 1
    assert "was stopped before the mount was ready" in said[1]
    assert_nothing_left(directory)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("where", ["daemon", "foreground"])
def test_giving_up_while_the_tree_is_built_leaves_nothing(
    directory: Path, where: str, number: signal.Signals, status: int
) -> None:
    starter = start_fake_server(directory, "--build", "wait", *(["--foreground"] if where == "foreground" else []))
    wait_for((directory / "control" / "building").exists, "the server to build")
    starter.send_signal(number)
    starter.communicate(timeout=DEADLINE)
    assert starter.returncode == status
    assert_nothing_left(directory)


def test_a_server_whose_starter_was_killed_does_not_mount_for_nobody(directory: Path) -> None:
    starter = start_fake_server(directory, "--build", "wait")
    wait_for((directory / "control" / "building").exists, "the server to build")
    starter.kill()
    starter.wait()
    pid = server_pid(directory)
    (directory / "control" / "build-on").touch()
    assert starter.stderr is not None
    starter.stderr.close()
    wait_for(lambda: not is_running(pid), "the end of the server")
    assert find_mount(directory / "mnt") is None


# -- what is checked before the start ---------------------------------------------------------------------------------


def test_a_mount_point_has_to_exist(directory: Path) -> None:
    with pytest.raises(MountError, match="does not exist; make it with `mkdir -p"):
        check_mountpoint(directory / "missing")


def test_a_mount_point_has_to_be_a_directory(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        check_mountpoint(directory / "file")


def test_a_mount_point_has_to_be_empty(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(MountError, match="is not empty"):
        check_mountpoint(directory)


def test_a_mount_point_of_another_file_system_is_refused() -> None:
    with pytest.raises(MountError, match=r"/proc is already a mount point \(proc\)"):
        check_mountpoint(Path("/proc"))


def test_a_directory_is_mounted_once_only(directory: Path) -> None:
    with fake_mount(directory) as mount:
        status, said = run_fake(directory)
        assert status == 1
        assert said == [
            f"mergefs: error: {mount.mountpoint} is already a mount of mergefs; "
            f"run `mergefs umount {mount.mountpoint}` first, or mount elsewhere"
        ]


def test_nothing_is_built_before_the_mount_point_is_checked(directory: Path) -> None:
    (directory / "mnt").mkdir()
    (directory / "mnt" / "file").touch()
    status, said = run_fake(directory)
    assert status == 1
    assert len(said) == 1
    assert not (directory / "control" / "building").exists()


def test_a_mount_point_is_found_through_links_and_relative_names(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_mount(directory) as mount:
        (directory / "link").symlink_to("mnt")
        monkeypatch.chdir(directory)
        for name in ("link", "mnt", "./mnt/", "x/../mnt"):
            found = find_mount(Path(name))
            assert found is not None, name
            assert found.mountpoint == mount.mountpoint


@pytest.mark.parametrize(
    ("target", "source", "sentence"),
    [
        ("mnt", "mnt/model", "the source .*mnt/model lies inside the mount point"),
        ("mnt", "mnt", "lies inside the mount point"),
        ("mnt", "link/model", "lies inside the mount point"),
        ("models/base/mnt", "models/base", "the mount point .* lies inside the source"),
    ],
)
def test_a_mount_may_not_hide_its_sources_nor_lie_among_them(
    tmp_path: Path, target: str, source: str, sentence: str
) -> None:
    (tmp_path / target).mkdir(parents=True)
    (tmp_path / "link").symlink_to("mnt")
    with pytest.raises(MountError, match=sentence):
        refuse_sources_inside(tmp_path / target, [tmp_path / source])


def test_sources_beside_the_mount_point_are_no_problem(tmp_path: Path) -> None:
    refuse_sources_inside(tmp_path / "mnt", [tmp_path / "mnt2", tmp_path / "models/base", tmp_path / "mn"])


def test_a_refusal_after_the_build_leaves_nothing(directory: Path) -> None:
    status, said = run_fake(directory, "--source", directory / "mnt" / "model")
    assert status == 1
    assert "lies inside the mount point" in said[-1]
    assert_nothing_left(directory)


def test_a_log_file_may_not_be_hidden_by_its_own_mount(directory: Path) -> None:
    status, said = run_fake(directory, "--log-file", directory / "mnt" / "server.log")
    assert status == 1
    assert "lies inside the mount point" in said[-1]


def test_a_log_file_that_cannot_be_written_is_named(directory: Path) -> None:
    (directory / "file").touch()
    status, said = run_fake(directory, "--log-file", directory / "file" / "server.log")
    assert status == 1
    sentences = [line for line in said if "cannot write the log file" in line]
    assert len(sentences) == 1
    assert re.search(r"/file/server\.log: .*; name another with --log-file", sentences[0])
    assert find_mount(directory / "mnt") is None


def test_without_the_device_the_user_learns_what_to_use_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mountpoint, "_DEVICE", tmp_path / "fuse")
    with pytest.raises(MountError) as caught:
        mountpoint.check_device()
    for hint in ("--device /dev/fuse", "mergefs.open()", "mergefs.load_state_dict()", "mergefs materialize"):
        assert hint in str(caught.value)


def test_without_libfuse_the_user_learns_what_to_install(directory: Path) -> None:
    status, said = run_fake(directory, extra={"FUSE_LIBRARY_PATH": str(directory / "libfuse.so")})
    assert status == 1
    assert len(said) == 1
    for hint in ("apt-get install libfuse2", "fuse3", "dnf install fuse-libs", "mergefs.open()", "mergefs materialize"):
        assert hint in said[0]


def test_another_package_that_is_called_fuse_is_not_taken_for_fusepy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fuse.py").write_text("class Fuse: pass\n")
    (tmp_path / "mfusepy.py").write_text("raise OSError('Unable to find libfuse')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fuse", raising=False)
    monkeypatch.delitem(sys.modules, "mfusepy", raising=False)
    with pytest.raises(MountError, match=r"fuse\.py belongs to another package than fusepy"):
        bindings.load_binding()
    sys.modules.pop("fuse", None)


def test_libfuses_own_words_reach_the_user_when_it_cannot_mount(directory: Path) -> None:
    # An option that libfuse does not know: what it says about that is on its stderr only.
    code = (
        "import os, sys; from mergefs.mount import bindings; options = bindings.mount_options\n"
        "bindings.mount_options = lambda *given: options(*given) | {'no_such_option': True}\n"
        "sys.argv[0] = 'fake_server.py'; import fake_server; sys.exit(fake_server.main())"
    )
    (directory / "mnt").mkdir()
    (directory / "control").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, directory / "control", directory / "mnt"],
        capture_output=True,
        text=True,
        env=environment(directory / "state"),
        check=False,
    )
    assert result.returncode == 1
    assert re.search(r"mergefs: error: cannot mount on .*/mnt: .*no_such_option", result.stderr)
    assert_nothing_left(directory)


# -- ending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", [fake_mount, foreground_mount])
def test_a_signal_unmounts_an_idle_server_cleanly(directory: Path, where: object, number: signal.Signals) -> None:
    with where(directory) as mount:  # type: ignore[operator]
        mount.kill(number)
        assert mount.wait() == 0
        assert find_mount(mount.mountpoint) is None
        assert (mount.control / "closed").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_read_lets_the_read_end_and_then_unmounts(directory: Path, number: signal.Signals) -> None:
    with fake_mount(directory) as mount:
        client = reader(mount.mountpoint / "slow.bin")
        wait_for((mount.control / "reading").exists, "a read in flight")
        mount.kill(number)
        (mount.control / "go-on").touch()
        data = client.communicate(timeout=DEADLINE)[0]
        assert mount.wait() == 0
        assert data == pattern(4096, 1 << 16)
        assert find_mount(mount.mountpoint) is None
        assert (mount.control / "closed").exists()


def test_a_hangup_that_nohup_ignores_is_ignored(directory: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        with fake_mount(directory) as mount:
            mount.kill(signal.SIGHUP)
            assert (mount.mountpoint / "config.json").read_bytes() == FILES["/config.json"]
            mount.kill(signal.SIGTERM)
            assert mount.wait() == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_can_ask_for_the_stacks_of_all_threads(directory: Path) -> None:
    with fake_mount(directory) as mount:
        client = reader(mount.mountpoint / "slow.bin")
        wait_for((mount.control / "reading").exists, "a read in flight")
        mount.kill(signal.SIGUSR1)
        wait_for(lambda: "most recent call first" in mount.log(), "the stacks in the log")
        (mount.control / "go-on").touch()
        assert client.communicate(timeout=DEADLINE)[0] == pattern(4096, 1 << 16)
        log = mount.log()
        assert "fake_tree.py" in log
        assert "bindings.py" in log
        mount.unmount()
        assert mount.wait() == 0
        mount.log_file.write_text("")  # stacks are no records
