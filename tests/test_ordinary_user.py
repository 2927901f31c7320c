"""Everything about a mount works for an ordinary user, who mounts through the system's setuid helper."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from examples import METHODS, Families, FamilyKind
from mounting import DEADLINE, unexpected_records, wait_for
from ordinary_user import ROOT, Machine, end_of, machine
from recipes import recipe_document, write_document

pytestmark = pytest.mark.mounts

FILE: Final = "config.json"


@pytest.fixture(scope="module")
def shared(families: Families) -> Iterator[Machine]:
    with machine() as user:
        yield user


@pytest.fixture
def user(shared: Machine) -> Iterator[Machine]:
    """A machine on which no test may leave a mount."""
    yield shared
    assert shared.mergefs("status", shared.home / "mnt").returncode == 1, "is not a mount point"


def prepared(user: Machine, families: Families) -> tuple[Path, Path]:
    """Write a directory with a recipe that the user may read, and return it and where to mount it."""
    recipes = user.home / "recipes"
    write_document(recipes / "merge.yml", recipe_document(METHODS["linear"], families(FamilyKind())))
    return recipes, user.home / "mnt"


def mounted(user: Machine, recipes: Path, mountpoint: Path, *options: str) -> int:
    """Mount, which must succeed, and return the server's process."""
    done = user.mergefs("--log-file", user.home / "home" / "server.log", "mount", *options, recipes, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return server_of(user, mountpoint)


def server_of(user: Machine, mountpoint: Path) -> int:
    (report,) = json.loads(user.mergefs("status", "--json", mountpoint).stdout)
    assert report["state"] == "live"
    return int(report["pid"])


def test_a_user_mounts_reads_and_unmounts_and_nobody_else_sees_it(user: Machine, families: Families) -> None:
    recipes, mountpoint = prepared(user, families)
    server = mounted(user, recipes, mountpoint)
    if ROOT:
        assert Path(f"/proc/{server}").stat().st_uid != 0
        assert "Permission denied" in user.run("ls", mountpoint, as_root=True).stderr
        assert "another user mounted it" in user.mergefs("status", mountpoint, as_root=True).stdout
    read = user.run("cat", mountpoint / "merge" / FILE)
    assert json.loads(read.stdout)["model_type"] == "llama"
    assert user.run("ls", mountpoint).stdout == "merge\n"
    assert user.run("ls", mountpoint / "merge@weight=0.5").returncode == 0
    assert "Read-only file system" in user.run("touch", mountpoint / "new").stderr
    done = user.mergefs("umount", mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert end_of(server) == 0
    assert unexpected_records((user.home / "home" / "server.log").read_text()) == []


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.chdir(path + '/merge/')", r"its working directory {path}/\.plans/[-\w]+"),
        ("f = open(path + '/merge/config.json')", r"an open file {path}/\.plans/[-\w]+/config\.json"),
        (
            "import mmap; f = open(path + '/merge/config.json'); m = mmap.mmap(f.fileno(), 0, prot=1); f.close(); "
            "import os; os.closerange(3, 100)",
            r"a mapped file {path}/\.plans/[-\w]+/config\.json",
        ),
    ],
)
def test_a_user_learns_who_holds_a_mount_and_may_take_it_away_lazily(
    user: Machine, families: Families, code: str, how: str
) -> None:
    recipes, mountpoint = prepared(user, families)
    server = mounted(user, recipes, mountpoint)
    program = f"import sys; path = sys.argv[1]\n{code}\nprint('held', flush=True); sys.stdin.read()"
    with user.running(sys.executable, "-c", program, mountpoint) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        busy = user.mergefs("umount", mountpoint)
        assert busy.returncode == 1
        held = re.escape(f"python (pid {holder.pid}, ") + how.format(path=re.escape(str(mountpoint))) + r"\)"
        assert re.search(held, busy.stderr), busy.stderr
        if ROOT:
            # Root sees it, too, though not what is in the mount.
            assert re.search(held, user.mergefs("umount", mountpoint, as_root=True).stderr)
        assert user.mergefs("umount", "--lazy", mountpoint).returncode == 0
        assert user.run("ls", mountpoint).stdout == ""
    assert end_of(server) == 0


def test_a_user_clears_a_crashed_mount_and_mounts_anew(user: Machine, families: Families) -> None:
    recipes, mountpoint = prepared(user, families)
    server = mounted(user, recipes, mountpoint)
    os.kill(server, signal.SIGKILL)
    assert end_of(server) == -signal.SIGKILL
    assert f"{mountpoint}: crashed; " in user.mergefs("status", mountpoint).stdout
    again = user.mergefs("mount", recipes, mountpoint)
    assert again.returncode == 1
    assert f"is a crashed mount whose server is gone; run `mergefs umount {mountpoint}` to clear it" in again.stderr
    assert user.mergefs("umount", mountpoint).returncode == 0
    server = mounted(user, recipes, mountpoint)
    assert user.mergefs("umount", mountpoint).returncode == 0
    assert end_of(server) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_users_mount_ends_cleanly_at_a_signal(user: Machine, families: Families, number: signal.Signals) -> None:
    recipes, mountpoint = prepared(user, families)
    words = (sys.executable, "-m", "mergefs.cli", "mount", "--foreground", recipes / "merge.yml", mountpoint)
    with user.running(*words, stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        wait_for(lambda: b": serving " in server.stderr.readline(), "the mount")  # type: ignore[union-attr]
        assert user.run("cat", mountpoint / FILE).returncode == 0
        server.send_signal(number)
        assert server.wait(DEADLINE) == 0
    assert user.run("ls", mountpoint).stdout == ""


@pytest.mark.parametrize("allowed", [True, False])
def test_a_user_may_let_others_in_where_the_system_lets_users(families: Families, allowed: bool) -> None:
    configuration = "user_allow_other" if allowed else "# user_allow_other"
    if not ROOT and allowed is not bool(re.search("^user_allow_other", Path("/etc/fuse.conf").read_text(), re.M)):
        pytest.skip("only root can change /etc/fuse.conf")
    with machine(configuration) as user:
        recipes, mountpoint = prepared(user, families)
        if not allowed:
            refused = user.mergefs("mount", "--allow-other", recipes, mountpoint)
            assert refused.returncode == 1
            assert f"cannot mount on {mountpoint}: " in refused.stderr
            assert "user_allow_other" in refused.stderr
            assert refused.stderr.count("\n") == 1
            return
        server = mounted(user, recipes, mountpoint, "--allow-other")
        assert user.run("cat", mountpoint / "merge" / FILE, as_root=True).returncode == 0
        # Root may take away what a user has mounted.
        assert user.mergefs("umount", mountpoint, as_root=True).returncode == 0
        assert end_of(server) == 0


def test_a_user_cannot_mount_where_only_root_may_write(user: Machine, families: Families) -> None:
    if not ROOT:
        pytest.skip("only root can make a directory that is not the user's")
    recipes, _ = prepared(user, families)
    mountpoint = user.home.parent / "not-mine"
    mountpoint.mkdir()
    refused = user.mergefs("mount", recipes, mountpoint)
    assert refused.returncode == 1
    assert re.search(f"cannot mount on {mountpoint}: .*no write access", refused.stderr), refused.stderr


def test_a_user_who_may_not_open_the_device_learns_it(user: Machine, families: Families) -> None:
    if not ROOT:
        pytest.skip("only root can close the device to others")
    recipes, mountpoint = prepared(user, families)
    assert user.run("chmod", "600", "/dev/fuse", as_root=True).returncode == 0
    try:
        refused = user.mergefs("mount", recipes, mountpoint)
    finally:
        assert user.run("chmod", "666", "/dev/fuse", as_root=True).returncode == 0
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "mergefs: error: cannot open /dev/fuse (Permission denied): let this user read and "
    )
    assert "mergefs.open()" in refused.stderr


def test_root_of_a_container_that_may_not_mount_learns_what_to_do(user: Machine, families: Families) -> None:
    if not ROOT:
        pytest.skip("only root can be root without the right to mount")
    recipes, mountpoint = prepared(user, families)
    words = (sys.executable, "-m", "mergefs.cli", "mount", recipes, mountpoint)
    refused = user.run("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *words, as_root=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"mergefs: error: cannot mount on {mountpoint}: ")
    assert "in a container add `--device /dev/fuse --cap-add SYS_ADMIN`" in refused.stderr
    assert "mergefs.open()" in refused.stderr


def test_mount_8s_words_work_for_a_user(user: Machine, families: Families) -> None:
    recipes, mountpoint = prepared(user, families)
    done = user.mergefs(recipes / "merge.yml", mountpoint, "-o", "rw,user,noatime,budget=100%")
    assert (done.returncode, done.stderr) == (0, "")
    server = server_of(user, mountpoint)
    assert user.run(shutil.which("fusermount3") or "", "-u", mountpoint).returncode == 0
    assert end_of(server) == 0
