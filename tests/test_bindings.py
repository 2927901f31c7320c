"""Both Python bindings of libfuse, and both versions of it, show the same; and which of them is taken.

``scripts/test.sh --all`` runs every test that is marked ``mounts`` under each binding. What is here runs always.
"""

# These tests are about system calls, by their names.
# ruff: noqa: PTH101, PTH116

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from mounting import Mount, fake_mount, run_fake

from mergefs.errors import MountError, UsageError
from mergefs.mount import bindings
from mergefs.mount.bindings import CHOICE, LOADERS
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.unmount import unmount

# What names a binding -> what the log calls it.
SETTINGS: Final[dict[str, dict[str, str]]] = {
    "through mfusepy and libfuse 3": {CHOICE: "mfusepy"},
    "through fusepy and libfuse 2": {CHOICE: "fusepy"},
    "through mfusepy and libfuse 2": {CHOICE: "mfusepy", "FUSE_LIBRARY_NAME": "fuse"},
}


def entries(directory: Path) -> list[tuple[str, int, bool]]:
    with os.scandir(directory) as found:
        return [(entry.name, entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in found]


def contents(path: Path) -> tuple[int, str]:
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def fields(path: Path) -> tuple[int, ...]:
    """Return what ``lstat`` says, but for the device, which is another for each mount."""
    found = os.lstat(path)
    times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
    return (found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_blocks, found.st_blksize, *times)


QUESTIONS: Final[dict[str, Callable[[Path], object]]] = {
    "lstat": fields,
    "owner": lambda path: (os.lstat(path).st_uid, os.lstat(path).st_gid),
    "entries": entries,
    "contents": contents,
    "link": os.readlink,
    "statvfs": lambda path: tuple(os.statvfs(path)),
    "attributes": lambda path: os.listxattr(path, follow_symlinks=False),
    "plan": lambda path: os.getxattr(path, "user.mergefs.plan_id"),
    "other attribute": lambda path: os.getxattr(path, "user.other"),
    "open to write": lambda path: os.open(path, os.O_RDWR),
    "change": lambda path: os.chmod(path, 0o777),
    "below": lambda path: os.stat(path / "nothing"),
}


def answer(question: str, path: Path) -> object:
    """Return what the system answers, or the errno."""
    try:
        return QUESTIONS[question](path)
    except OSError as error:
        return f"errno {error.errno}"


def picture(mount: Mount) -> dict[str, dict[str, object]]:
    """Return the answers to all questions about every entry of a mount, by path."""
    (mount.control / "go-on").touch()  # for the file that waits for it
    seen: dict[str, dict[str, object]] = {}
    waiting = [mount.mountpoint]
    while waiting:
        path = waiting.pop()
        answers = {question: answer(question, path) for question in QUESTIONS}
        seen[os.fspath(path.relative_to(mount.mountpoint))] = answers
        listed = answers["entries"]
        waiting += [path / entry[0] for entry in listed] if isinstance(listed, list) else []
    return seen


def options(mountpoint: Path) -> set[str]:
    """Return the options that the kernel has for a mount."""
    entry = find_mount(mountpoint)
    assert entry is not None
    return set(entry.options)


def test_every_binding_shows_the_same(directory: Path) -> None:
    pictures: list[dict[str, dict[str, object]]] = []
    given: list[set[str]] = []
    for served, extra in SETTINGS.items():
        place = directory / served.replace(" ", "-")
        place.mkdir()
        with fake_mount(place, extra=extra) as mount:
            mount.allowed.append(".*")  # the tree fails on purpose
            assert f"{served}." in mount.log()
            pictures.append(picture(mount))
            given.append(options(mount.mountpoint))
    assert len(pictures[0]) > 100
    for one in pictures[1:]:
        assert one == pictures[0]
    assert given[1:] == given[:-1]


@pytest.mark.parametrize("served", SETTINGS)
@pytest.mark.parametrize(
    "command", ["umount", "fusermount -u", "fusermount3 -u", "fusermount3 -u -z", "mergefs umount"]
)
def test_every_way_to_unmount_ends_every_server(directory: Path, served: str, command: str) -> None:
    with fake_mount(directory, extra=SETTINGS[served]) as mount:
        if command == "mergefs umount":
            unmount(mount.mountpoint)
        elif command == "umount" and os.geteuid() != 0:
            pytest.skip("only root may call umount for what no table of file systems has")
        else:
            subprocess.run([*command.split(), mount.mountpoint], check=True)
        assert mount.wait() == 0
        assert find_mount(mount.mountpoint) is None


# -- which one is taken -----------------------------------------------------------------------------------------------


def test_libfuse_3_is_preferred_where_it_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    assert next(iter(LOADERS)) == "mfusepy"
    binding = bindings.load_binding()
    assert (binding.name, binding.libfuse[0]) == ("mfusepy", 3)


def test_without_the_extra_fuse3_libfuse_2_is_used(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    hidden = directory / "hidden"
    hidden.mkdir()
    (hidden / "mfusepy.py").write_text("raise ModuleNotFoundError('as if it were not installed')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")]))
    with fake_mount(directory, extra={CHOICE: ""}) as mount:
        assert "through fusepy and libfuse 2." in mount.log()


@pytest.mark.parametrize("choice", ["fuse3", "libfuse", "FUSEPY"])
def test_what_is_no_binding_is_refused(directory: Path, choice: str) -> None:
    sentence = f"{CHOICE} is {choice!r}, which is no binding of libfuse; set it to mfusepy or fusepy"
    assert run_fake(directory, extra={CHOICE: choice}) == (2, [f"mergefs: error: {sentence}"])


def test_a_binding_that_was_chosen_and_does_not_work_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> bindings.Binding:
        raise OSError("libfuse is broken")

    monkeypatch.setattr(bindings, "LOADERS", {**LOADERS, "mfusepy": fail})
    monkeypatch.setenv(CHOICE, "mfusepy")
    with pytest.raises(MountError, match=r"no usable libfuse was found \(mfusepy: libfuse is broken\)"):
        bindings.load_binding()
    monkeypatch.setenv(CHOICE, "nothing")
    with pytest.raises(UsageError, match="is no binding"):
        bindings.load_binding()
    monkeypatch.delenv(CHOICE)
    assert bindings.load_binding().name == "fusepy"


def test_the_system_has_what_unmounts_for_either_version() -> None:
    assert shutil.which("fusermount")
    assert shutil.which("fusermount3")
