"""``mount -t fuse.mergefs`` and /etc/fstab mount merges."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from examples import METHODS, Families, FamilyKind
from hypothesis import given
from hypothesis import strategies as st
from mounting import DEADLINE, Mount, adopt_orphans, clear_mounts_below, environment, unexpected_records
from ordinary_user import FORGET_MOUNTS
from recipes import recipe_document, write_document

from mergefs.cli.mount_helper import translate_helper_call
from mergefs.errors import UsageError
from mergefs.mount.mountinfo import find_mount

pytestmark = pytest.mark.mounts

_ROOT: Final = os.geteuid() == 0
FROM_FSTAB: Final = "rw,noatime,x-systemd.automount,allow_other,budget=100%,cache_size=64MiB,log_file={log},dev,suid"
"""As libfuse's ``mount.fuse`` passes on what stands in /etc/fstab."""


class Fstab:
    """A recipe, and where and how it is mounted."""

    def __init__(self, directory: Path, families: Families) -> None:
        self.directory = directory
        # A comma and a space: what /etc/fstab and libfuse have ways of their own to write.
        self.recipe = directory / "re cipes, all" / "merge.yml"
        write_document(self.recipe, recipe_document(METHODS["linear"], families(FamilyKind())))
        self.mountpoint = directory / "mount point"
        self.mountpoint.mkdir()
        self.log = directory / "server.log"
        self.options = FROM_FSTAB.format(log=self.log)
        if not _ROOT:
            self.options = self.options.replace("allow_other,", "")  # which the system's administrator must allow
        programs = directory / "bin"
        programs.mkdir()
        (programs / "mergefs").write_text(f'#!/bin/sh\nexec {sys.executable} -m mergefs.cli "$@"\n')
        (programs / "mergefs").chmod(0o755)
        self.environment = environment(directory / "state", {"PATH": f"{programs}:{os.environ['PATH']}"})
        self.table = directory / "fstab"
        blanks = [str(path).replace(" ", "\\040") for path in (self.recipe, self.mountpoint)]
        self.table.write_text(f"{blanks[0]} {blanks[1]} fuse.mergefs {self.options} 0 0\n")

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        adopt_orphans()
        return subprocess.run(
            [*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=DEADLINE, check=False
        )

    def assert_serves(self) -> None:
        """Check what is mounted and that it can be read, and take it away."""
        entry = find_mount(self.mountpoint)
        assert entry is not None
        assert (entry.filesystem, entry.source) == ("fuse.mergefs", str(self.recipe))
        assert ("allow_other" in entry.options) is _ROOT
        assert "ro" in entry.options
        assert (self.mountpoint / "config.json").read_bytes().startswith(b"{")
        served = re.search(r"as process (\d+)", self.log.read_text())
        assert served is not None
        mount = Mount(self.mountpoint, int(served[1]), self.log, self.directory)
        mount.unmount()
        assert mount.wait() == 0
        assert unexpected_records(mount.log()) == []


@pytest.fixture
def fstab(tmp_path: Path, families: Families) -> Iterator[Fstab]:
    yield Fstab(tmp_path, families)
    assert clear_mounts_below(tmp_path) == []


def commands(fstab: Fstab) -> list[list[str | Path]]:
    """Return how it can be mounted without being installed: in the words of mount.fuse, by that, and by mount(8)."""
    helper: list[str | Path] = ["/sbin/mount.fuse", fstab.recipe, fstab.mountpoint, "-o", fstab.options]
    found = [["mergefs", fstab.recipe, fstab.mountpoint, "-o", fstab.options], [*helper, "-t", "fuse.mergefs"]]
    if _ROOT:
        named = f"{fstab.directory}/bin/mergefs#{fstab.recipe}"
        found.append(["mount", "-t", "fuse", "-o", fstab.options, named, fstab.mountpoint])
    return found


def test_a_merge_is_mounted_by_the_helpers_of_the_system(fstab: Fstab) -> None:
    for command in commands(fstab):
        done = fstab.run(*command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), command
        fstab.assert_serves()
        fstab.log.unlink()


def test_what_is_wrong_is_said_and_fails(fstab: Fstab) -> None:
    fstab.recipe.unlink()
    for command in commands(fstab):
        done = fstab.run(*command)
        assert done.returncode != 0
        assert f"mergefs: error: {fstab.recipe}: there is no such recipe" in done.stderr
        assert find_mount(fstab.mountpoint) is None


@pytest.mark.skipif(not _ROOT, reason="only root may mount what stands in a table of file systems")
@pytest.mark.parametrize(
    "command",
    [
        'mount -t fuse.mergefs -o "$options" "$recipe" "$mountpoint"',
        'mount --fstab "$table" "$mountpoint"',
        'mount --all --fstab "$table"; mount --all --fstab "$table"',  # what is there already is left alone
    ],
)
def test_mount_finds_mergefs_where_it_is_installed(fstab: Fstab, command: str) -> None:
    """Run mount(8) where ``mergefs`` lies in a directory that mount(8) looks in, which only the test sees."""
    variables = {
        "options": fstab.options,
        "recipe": str(fstab.recipe),
        "mountpoint": str(fstab.mountpoint),
        "table": str(fstab.table),
    }
    script = f"""
        {FORGET_MOUNTS}
        mount --bind {fstab.directory}/bin /usr/local/sbin
        {command}
        grep -c {fstab.directory}/mount /proc/self/mounts
        findmnt --noheadings --output SOURCE,FSTYPE --mountpoint "$mountpoint"
        head -c 1 "$mountpoint/config.json"
        umount "$mountpoint"
    """
    fstab.environment |= variables
    done = fstab.run("unshare", "--mount", "sh", "-euc", script)
    assert (done.returncode, done.stderr) == (0, ""), fstab.log.read_text()
    mounts, found, beginning = done.stdout.splitlines()
    assert found.split(" fuse.mergefs")[0].strip() == str(fstab.recipe)
    assert mounts == "1"
    assert beginning == "{"
    assert unexpected_records(fstab.log.read_text()) == []


def test_options_become_those_of_the_command() -> None:
    call = ["/r.yml", "/mnt", "-o", "ro,user,budget=25%,base=/a\\,b,no_verify_reads,warm,catalog=/c,verbose,dev,suid"]
    assert translate_helper_call(call) == [
        *("--catalog=/c", "mount", "--fsname", "/r.yml", "--budget=25%", "--base=/a,b", "--no-verify-reads", "--warm"),
        *("--verbose", "--", "/r.yml", "/mnt"),
    ]
    assert translate_helper_call(["r", "m", "-v", "-t", "fuse.mergefs", "-n", "-s", "-o", "rw"]) == [
        *("mount", "--fsname", "r", "--", "r", "m")
    ]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("bugdet=25%", "there is no mount option 'bugdet'; use the options of `mergefs mount --help`"),
        ("budget", "the mount option budget takes a value; write budget=..."),
        ("allow_other=yes", "the mount option allow_other takes no value; write allow_other alone"),
        ("foreground", "there is no mount option 'foreground'"),
        ("fsname=x", "there is no mount option 'fsname'"),
    ],
)
def test_a_wrong_option_is_named(option: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        translate_helper_call(["/r.yml", "/mnt", "-o", f"rw,{option}"])
    assert sentence in str(caught.value)


@given(st.lists(st.sampled_from(["mount", "plan", "a.yml", "/mnt", "-v", "--budget", "-t", "x", "-f"]), max_size=6))
def test_what_is_no_such_call_is_left_as_it_is(arguments: list[str]) -> None:
    assert translate_helper_call(arguments) is None
    assert translate_helper_call(["mount", *arguments, "-o", "rw"]) is None
