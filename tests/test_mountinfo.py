"""Reading the kernel's list of mounts."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergefs.mount import mountinfo
from mergefs.mount.mountinfo import MountEntry, parse_mountinfo, within_deadline

_LINES = rb"""22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro
23 22 0:21 / /proc rw,nosuid shared:7 master:3 - proc proc rw
36 22 0:45 / /mnt/a\040b ro,nosuid,nodev - fuse.mergefs mergefs ro,user_id=1000,group_id=1000
37 22 0:46 / /mnt/c ro shared:9 - fuse.mergefs merge\043fs ro,user_id=0
38 37 0:47 / /mnt/c ro - tmpfs none rw
"""


def escape(path: bytes) -> bytes:
    """Escape ``path`` as the kernel does."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)


def test_every_field_is_read_whatever_optional_fields_stand_between() -> None:
    entries = parse_mountinfo(_LINES)
    assert entries[2] == MountEntry(
        mount_id=36,
        device="0:45",
        mountpoint=Path("/mnt/a b"),
        filesystem="fuse.mergefs",
        source="mergefs",
        options=("ro", "nosuid", "nodev", "ro", "user_id=1000", "group_id=1000"),
    )
    assert [entry.source for entry in entries] == ["/dev/sda1", "proc", "mergefs", "merge#fs", "none"]


@given(st.lists(st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b), min_size=1, max_size=4))
def test_any_path_the_kernel_can_have_comes_back_byte_for_byte(names: list[bytes]) -> None:
    path = b"/mnt/" + b"/".join(name.replace(b"/", b"_") for name in names)
    line = b"36 22 0:45 / %s ro - fuse.mergefs mergefs ro\n" % escape(path)
    assert os.fsencode(parse_mountinfo(line)[0].mountpoint) == os.fsencode(Path(os.fsdecode(path)))


def test_only_mounts_of_mergefs_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(_LINES)
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", tmp_path / "mountinfo")
    assert [str(entry.mountpoint) for entry in mountinfo.list_mounts()] == ["/mnt/a b", "/mnt/c"]


def test_a_mount_that_hides_another_is_the_one_that_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(_LINES)
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", tmp_path / "mountinfo")
    found = mountinfo.find_mount(Path("/mnt/x/../c/"))
    assert found is not None
    assert found.filesystem == "tmpfs"
    assert mountinfo.find_mount(Path("/mnt")) is None


def test_a_mount_is_found_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    found = mountinfo.find_mount(tmp_path / "link")
    assert found is not None
    assert found.filesystem == "proc"


def _entry(path: Path) -> MountEntry:
    return MountEntry(1, "0:1", path, "fuse.mergefs", "mergefs", ())


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOTCONN, "crashed"), (errno.EACCES, "live"), (errno.EIO, "live")]
)
def test_only_a_mount_without_a_server_is_crashed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, expected: str
) -> None:
    def answer(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "statvfs", answer)
    assert mountinfo.state(_entry(tmp_path)) == expected


def test_a_silent_server_is_stuck_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(os, "statvfs", lambda path: go_on.wait(60))
    started = time.monotonic()
    assert mountinfo.state(_entry(tmp_path), seconds=0.01) == "stuck"
    assert time.monotonic() - started < 50
    go_on.set()


def test_a_call_within_its_deadline_gives_its_result_or_its_error() -> None:
    assert within_deadline(lambda: None, 30) is None
    assert within_deadline(lambda: 7, 30) == 7
    with pytest.raises(KeyError):
        within_deadline(lambda: os.environ["MERGEFS_NOT_SET"], 30)
