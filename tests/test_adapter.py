"""The adapter on real mounts of a fake tree: what clients see, and what they see when the tree fails."""

# These tests are about system calls, by their names.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH208, PTH211

import concurrent.futures
import errno
import fcntl
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_tree import BIG_SIZE, FAULTS, FILES, LINKS, MTIME_NS, STATUS, WRONG_ANSWERS, FakeTree, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import Mount, clear_mounts_below, fake_mount, split_records, wait_for

from mergefs.mount import bindings
from mergefs.mount.adapter import TreeOperations
from mergefs.mount.mountinfo import find_mount

pytestmark = pytest.mark.mounts


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    directory = tmp_path_factory.mktemp("sound")
    with fake_mount(directory) as mount:
        # One listing of the root asks about everything in it, also about what is there to fail.
        mount.allowed.append("'/attributes'")
        yield mount
    assert clear_mounts_below(directory) == []


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with fake_mount(tmp_path_factory.mktemp("faulty")) as mount:
        mount.allowed.append(".*")
        yield mount


def errno_of(action: Callable[[], object]) -> int:
    """Return the errno with which ``action`` fails."""
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno is not None
    return caught.value.errno


def read_at(path: Path, offset: int, size: int, flags: int = 0) -> bytes:
    """Read a range past the page cache, so that the server is asked."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


# -- what a sound mount shows -----------------------------------------------------------------------------------------


def test_the_mount_is_read_only_and_says_what_it_is(mount: Mount) -> None:
    entry = find_mount(mount.mountpoint)
    assert entry is not None
    assert entry.filesystem == "fuse.mergefs"
    assert entry.source == "mergefs"
    assert {"ro", "nosuid", "nodev", "default_permissions", f"user_id={os.getuid()}"} <= set(entry.options)
    assert "allow_other" not in entry.options
    assert f"mergefs {mount.mountpoint} fuse.mergefs ro," in Path("/proc/mounts").read_text()


@pytest.mark.parametrize("libfuse", [(2, 9), (3, 10), (3, 14)])
def test_no_option_breaks_mmap_or_the_page_cache(libfuse: tuple[int, int]) -> None:
    options = bindings.mount_options(False, libfuse)
    assert ("max_threads" in options) is (libfuse >= (3, 12))
    assert "direct_io" not in options
    assert options["kernel_cache"] is True
    assert options["allow_other"] is False


def test_other_users_are_let_in_on_request_only(tmp_path: Path) -> None:
    with fake_mount(tmp_path, "--allow-other") as mount:
        entry = find_mount(mount.mountpoint)
        assert entry is not None
        assert "allow_other" in entry.options


@pytest.mark.parametrize("name", ["config.json", "big.bin", "empty"])
def test_a_file_has_its_exact_size_and_the_plans_time(mount: Mount, name: str) -> None:
    found = os.lstat(mount.mountpoint / name)
    size = BIG_SIZE if name == "big.bin" else len(FILES[f"/{name}"])
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert (found.st_size, found.st_blocks, found.st_blksize) == (size, -(-size // 512), 1 << 20)
    assert {found.st_mtime_ns, found.st_ctime_ns, found.st_atime_ns} == {MTIME_NS}
    assert (found.st_uid, found.st_gid, found.st_nlink) == (os.getuid(), os.getgid(), 1)


def test_a_directory_counts_its_subdirectories_as_links(mount: Mount) -> None:
    found = os.lstat(mount.mountpoint / "sub")
    assert stat.S_ISDIR(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o555
    assert found.st_nlink == 3
    assert os.lstat(mount.mountpoint / "sub" / "deeper").st_nlink == 2


@pytest.mark.parametrize("path", LINKS)
def test_a_symbolic_link_leads_where_the_tree_says(mount: Mount, path: str) -> None:
    link = mount.mountpoint / path[1:]
    found = os.lstat(link)
    assert stat.S_ISLNK(found.st_mode)
    assert found.st_size == len(os.fsencode(LINKS[path]))
    assert os.readlink(link) == LINKS[path]


def test_a_link_within_the_mount_can_be_read_through(mount: Mount) -> None:
    assert (mount.mountpoint / "link").read_bytes() == b"one\n"


def test_inodes_are_the_trees_own_in_stat_and_in_listings(mount: Mount, tmp_path: Path) -> None:
    tree = FakeTree(tmp_path)
    with os.scandir(mount.mountpoint / "sub") as entries:
        listed = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}
    assert listed == {
        "one.txt": (tree.attributes("/sub/one.txt").inode, False),
        "deeper": (tree.attributes("/sub/deeper").inode, True),
    }
    assert (mount.mountpoint / "sub/one.txt").stat().st_ino == listed["one.txt"][0]


def test_every_name_is_listed_and_read_even_when_it_is_no_text(mount: Mount) -> None:
    names = set(os.listdir(mount.mountpoint))
    for path, content in FILES.items():
        assert path[1:].split("/")[0] in names
        assert (mount.mountpoint / path[1:]).read_bytes() == content


@pytest.mark.parametrize("name", [b"missing", b"not \xff utf-8", b"n" * 255, "日本".encode()])
def test_what_is_not_there_is_not_found(mount: Mount, name: bytes) -> None:
    assert errno_of(lambda: os.lstat(os.fsencode(mount.mountpoint) + b"/" + name)) == errno.ENOENT


def test_a_name_longer_than_a_name_can_be_is_refused(mount: Mount) -> None:
    assert errno_of(lambda: os.lstat(mount.mountpoint / ("n" * 10_000))) == errno.ENAMETOOLONG


def test_df_shows_the_real_total_and_nothing_free(mount: Mount) -> None:
    found = os.statvfs(mount.mountpoint)
    total = BIG_SIZE + sum(map(len, FILES.values()))
    assert total <= found.f_blocks * found.f_frsize < total + found.f_frsize
    assert (found.f_bfree, found.f_bavail, found.f_ffree) == (0, 0, 0)
    assert found.f_flag & os.ST_RDONLY


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, BIG_SIZE + 10_000), size=st.integers(0, 400_000), direct=st.booleans())
def test_any_range_of_a_file_is_what_the_tree_gives(mount: Mount, offset: int, size: int, direct: bool) -> None:
    data = read_at(mount.mountpoint / "big.bin", offset, size, os.O_DIRECT if direct else 0)
    assert data == pattern(offset, max(0, min(size, BIG_SIZE - offset)))


def test_many_threads_read_one_file_at_once(mount: Mount) -> None:
    ranges = [(37 * step * 4096 % BIG_SIZE, 150_000) for step in range(64)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda r: read_at(mount.mountpoint / "big.bin", *r), ranges)
    assert all(data == pattern(offset, len(data)) for (offset, _), data in zip(ranges, results, strict=True))


def test_a_mapped_file_shows_the_same_bytes(mount: Mount) -> None:
    with (mount.mountpoint / "big.bin").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[BIG_SIZE - 5 :] == pattern(BIG_SIZE - 5, 5)
            assert mapped[:] == pattern(0, BIG_SIZE)


def test_extended_attributes_are_listed_and_read(mount: Mount) -> None:
    path = mount.mountpoint / "config.json"
    assert os.listxattr(path) == ["user.mergefs.plan_id"]
    assert os.getxattr(path, "user.mergefs.plan_id") == b"plan-of-/config.json"
    assert errno_of(lambda: os.getxattr(path, "user.other")) == errno.ENODATA


def test_the_status_joins_what_the_tree_and_the_mount_know(mount: Mount) -> None:
    status = json.loads(os.getxattr(mount.mountpoint, "user.mergefs.status"))
    assert status.pop("mountpoint") == str(mount.mountpoint)
    assert status.pop("pid") == mount.pid
    assert status.pop("uptime_s") >= 0
    assert status == STATUS


def test_harmless_calls_on_open_files_succeed_or_are_refused_for_what_they_are(mount: Mount) -> None:
    with (mount.mountpoint / "config.json").open("rb") as file:
        os.fsync(file.fileno())
        fcntl.flock(file, fcntl.LOCK_SH)
        assert file.seek(0, os.SEEK_DATA) == 0
        assert file.seek(0, os.SEEK_HOLE) == len(FILES["/config.json"])
        assert errno_of(lambda: fcntl.ioctl(file, 0x5401)) == errno.ENOTTY
    directory = os.open(mount.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
    assert os.access(mount.mountpoint / "config.json", os.R_OK)
    assert not os.access(mount.mountpoint / "config.json", os.W_OK)


_CHANGES: dict[str, Callable[[Path], object]] = {
    "open for writing": lambda m: os.open(m / "config.json", os.O_WRONLY),
    "open for both": lambda m: os.open(m / "config.json", os.O_RDWR),
    "open to append": lambda m: os.open(m / "config.json", os.O_WRONLY | os.O_APPEND),
    "open to truncate": lambda m: os.open(m / "config.json", os.O_WRONLY | os.O_TRUNC),
    "create": lambda m: os.open(m / "new", os.O_WRONLY | os.O_CREAT),
    "unlink": lambda m: os.unlink(m / "config.json"),
    "rename": lambda m: os.rename(m / "config.json", m / "other.json"),
    "mkdir": lambda m: os.mkdir(m / "new"),
    "rmdir": lambda m: os.rmdir(m / "sub"),
    "chmod": lambda m: os.chmod(m / "config.json", 0o600),
    "chown": lambda m: os.chown(m / "config.json", 1, 1),
    "truncate": lambda m: os.truncate(m / "config.json", 0),
    "symlink": lambda m: os.symlink("config.json", m / "new"),
    "link": lambda m: os.link(m / "config.json", m / "new"),
    "utime": lambda m: os.utime(m / "config.json"),
    "utime with times": lambda m: os.utime(m / "config.json", (1, 1)),
    "mknod": lambda m: os.mknod(m / "new"),
    "mkfifo": lambda m: os.mkfifo(m / "new"),
    "setxattr": lambda m: os.setxattr(m / "config.json", "user.new", b"1"),
    "removexattr": lambda m: os.removexattr(m / "config.json", "user.mergefs.plan_id"),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_every_change_is_refused_as_on_a_read_only_file_system(mount: Mount, change: str) -> None:
    assert errno_of(lambda: _CHANGES[change](mount.mountpoint)) == errno.EROFS


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("open", ("/config.json", os.O_RDWR)),
        ("create", ("/new", 0o644)),
        ("write", ("/config.json", b"x", 0, 1)),
        ("truncate", ("/config.json", 0)),
        ("mknod", ("/new", 0o644, 0)),
        ("mkdir", ("/new", 0o755)),
        ("unlink", ("/config.json",)),
        ("rmdir", ("/sub",)),
        ("symlink", ("/new", "target")),
        ("rename", ("/config.json", "/new")),
        ("link", ("/new", "/config.json")),
        ("chmod", ("/config.json", 0o600)),
        ("chown", ("/config.json", 1, 1)),
        ("utimens", ("/config.json", None)),
        ("setxattr", ("/config.json", "user.new", b"1", 0)),
        ("removexattr", ("/config.json", "user.new")),
        ("access", ("/config.json", os.W_OK)),
    ],
)
def test_the_adapter_refuses_changes_even_when_the_kernel_lets_them_through(
    tmp_path: Path, operation: str, arguments: tuple[Any, ...]
) -> None:
    operations = TreeOperations(FakeTree(tmp_path), tmp_path)
    assert errno_of(lambda: getattr(operations, operation)(*arguments)) == errno.EROFS


# -- what clients see when the tree fails -----------------------------------------------------------------------------


def _open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


# How a client reaches each method of the tree.
_WAYS: dict[str, Callable[[Path], object]] = {
    "attributes": os.lstat,
    "entries": os.listdir,
    "open": _open_and_close,
    "read": lambda path: read_at(path, 0, 4096, os.O_DIRECT),
    "extended_attributes": os.listxattr,
    "extended_attribute": lambda path: os.getxattr(path, "user.mergefs.plan_id"),
}
_OPERATIONS = {
    "attributes": "getattr",
    "entries": "readdir",
    "open": "open",
    "read": "read",
    "extended_attributes": "listxattr",
    "extended_attribute": "getxattr",
    "release": "release",
    "total_size": "statfs",
}


_SENTENCES = ("OSError-no-such-errno", "MergefsError", "SourceChangedError")


def assert_alive(mount: Mount) -> None:
    """Check that the server still serves what is sound."""
    assert (mount.mountpoint / "config.json").read_bytes() == FILES["/config.json"]
    assert read_at(mount.mountpoint / "big.bin", 1000, 1000) == pattern(1000, 1000)


def assert_logged(mount: Mount, before: int, operation: str, path: str, fault: str) -> None:
    """Check that the failure has its record, with a traceback where nothing else says what happened."""
    records = split_records(mount.log()[before:])
    record = next((r for r in records if f"mergefs.mount: {operation} {path!r}: " in r), None)
    assert record is not None, records
    assert "answered " in record
    says_it_all = fault.startswith("OSError-E") or fault == "MemoryError" or fault in _SENTENCES
    assert ("Traceback" in record) is not says_it_all


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", _WAYS)
def test_an_exception_becomes_a_logged_errno(faulty: Mount, method: str, fault: str) -> None:
    before = len(faulty.log())
    path = f"/{method}/{fault}"
    assert errno_of(lambda: _WAYS[method](faulty.mountpoint / path[1:])) == FAULTS[fault].expected
    assert_logged(faulty, before, _OPERATIONS[method], path, fault)
    assert_alive(faulty)


@pytest.mark.parametrize(
    ("method", "answer"),
    [(method, answer) for method in WRONG_ANSWERS if method in _WAYS for answer in WRONG_ANSWERS[method]],
)
def test_a_wrong_answer_of_the_tree_is_an_io_error(faulty: Mount, method: str, answer: str) -> None:
    before = len(faulty.log())
    path = f"/{method}/{answer}"
    assert errno_of(lambda: _WAYS[method](faulty.mountpoint / path[1:])) == errno.EIO
    assert_logged(faulty, before, _OPERATIONS[method], path, answer)
    assert_alive(faulty)


@pytest.mark.parametrize("fault", [*FAULTS, *WRONG_ANSWERS["total_size"]])
def test_a_failure_without_a_path_is_answered_and_logged_too(faulty: Mount, fault: str) -> None:
    before = len(faulty.log())
    control = faulty.control / "total_size"
    control.write_text(fault)
    try:
        expected = FAULTS[fault].expected if fault in FAULTS else errno.EIO
        assert errno_of(lambda: os.statvfs(faulty.mountpoint)) == expected
    finally:
        control.unlink()
    assert_logged(faulty, before, "statfs", "/", fault)
    assert_alive(faulty)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_to_release_is_logged_and_harms_nobody(faulty: Mount, fault: str) -> None:
    before = len(faulty.log())
    path = f"/release/{fault}"
    _open_and_close(faulty.mountpoint / path[1:])
    # The kernel does not wait for a release, so neither does the client.
    wait_for(lambda: f"release {path!r}" in faulty.log()[before:], "the record of the release")
    assert_logged(faulty, before, "release", path, fault)
    assert_alive(faulty)


@pytest.mark.parametrize("fault", [*FAULTS, *WRONG_ANSWERS["read"]])
def test_a_failed_buffered_read_is_an_error_and_never_an_end_of_file(faulty: Mount, fault: str) -> None:
    assert errno_of((faulty.mountpoint / "read" / fault).read_bytes) in (
        errno.EIO,
        errno.ESTALE,
        errno.EACCES,
        errno.ENOMEM,
    )
    assert_alive(faulty)


def test_a_client_that_maps_a_failing_file_dies_of_it_and_the_server_does_not(faulty: Mount) -> None:
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[0])"
    client = subprocess.run(
        [sys.executable, "-c", code, faulty.mountpoint / "read" / "RuntimeError"], capture_output=True, check=False
    )
    assert client.returncode == -signal.SIGBUS
    assert client.stdout == b""
    assert_alive(faulty)


def test_a_directory_with_broken_entries_is_listed_all_the_same(faulty: Mount) -> None:
    assert set(os.listdir(faulty.mountpoint / "read")) == {*FAULTS, *WRONG_ANSWERS["read"]}
    assert "attributes" in os.listdir(faulty.mountpoint)
    assert os.lstat(faulty.mountpoint).st_nlink >= 2


def test_an_unknown_handle_is_an_io_error(tmp_path: Path) -> None:
    operations = TreeOperations(FakeTree(tmp_path), tmp_path)
    assert errno_of(lambda: operations.read("/config.json", 10, 0, 12345)) == errno.EIO
    assert errno_of(lambda: operations.release("/config.json", 12345)) == errno.EIO
