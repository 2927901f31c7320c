"""What docs/serving.md shows is run as it stands, with its directories moved below the test's own."""

import ast
import configparser
import errno
import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml
from examples import METHODS, Families, FamilyKind
from mounting import DEADLINE, adopt_orphans, clear_mounts_below, environment
from recipes import recipe_document, write_document
from serving_document import BLOCKS, DOCUMENT, blocks, moved

import mergefs
from mergefs.mount.mountinfo import find_mount

pytestmark = pytest.mark.mounts

_ROOT: Final = os.geteuid() == 0


class Machine:
    """A directory that stands for a machine with models, recipes, and ``mergefs`` installed."""

    def __init__(self, directory: Path, families: Families) -> None:
        self.directory = directory
        family = families(FamilyKind())
        document = recipe_document(METHODS["ties"], family)
        for path in ("ties.yml", "recipes/ties.yml", "srv/recipes/ties.yml"):
            write_document(directory / path, document)
        (directory / "org-base").symlink_to(family.base)
        for path in ("mnt/models", "mnt/merged", "bin"):
            (directory / path).mkdir(parents=True, exist_ok=True)
        self._program("mergefs", f'exec {sys.executable} -m mergefs.cli "$@"')
        self._program("vllm", 'test "$1" = serve && cat "$2/config.json"')
        self._program("sudo", 'exec "$@"' if _ROOT else "exit 0")  # what root alone may do is tried by root alone
        self.environment = environment(directory / "state", {"PATH": f"{directory}/bin:{os.environ['PATH']}"})

    def _program(self, name: str, script: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def moved(self, text: str) -> str:
        """Return ``text`` with the machine's directories in place of the system's."""
        if not _ROOT:  # the system's administrator must allow that
            text = text.replace("--allow-other ", "").replace("allow_other,", "")
        return moved(text, self.directory)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        adopt_orphans()
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE * 2,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done


@pytest.fixture
def machine(tmp_path: Path, families: Families) -> Iterator[Machine]:
    yield Machine(tmp_path, families)
    left = clear_mounts_below(tmp_path)
    assert left == []


def test_commands_and_programs_run_one_after_the_other(machine: Machine) -> None:
    for language, text in BLOCKS:
        if language == "bash":
            machine.run("bash", "-euo", "pipefail", "-c", machine.moved(text))
        elif language == "python":
            machine.run(sys.executable, "-c", machine.moved(text))
    assert (machine.directory / "merged" / "model.safetensors").exists()


def test_the_unit_starts_a_service_that_says_when_it_is_ready(machine: Machine) -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(machine.moved(blocks("ini")[0]))
    assert unit["Service"]["Type"] == "notify"
    command = shlex.split(unit["Service"]["ExecStart"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(machine.directory / "notify"))
        manager.settimeout(DEADLINE)
        variables = machine.environment | {"NOTIFY_SOCKET": str(machine.directory / "notify")}
        with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as service:
            assert manager.recv(100) == b"READY=1"
            assert (machine.directory / "mnt" / "models" / "ties" / "config.json").exists()
            service.send_signal(signal.SIGTERM)
            assert service.wait(DEADLINE) == 0
    assert find_mount(machine.directory / "mnt" / "models") is None


def test_a_service_that_was_killed_can_be_started_again(machine: Machine) -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(machine.moved(blocks("ini")[0]))
    start = shlex.split(unit["Service"]["ExecStart"])
    prefix, *after = unit["Service"]["ExecStopPost"]
    assert prefix == "-", "systemd goes on where this fails, as it does when there is nothing left to clear"
    clear = shlex.split("".join(after))
    served = machine.directory / "mnt" / "models" / "ties" / "config.json"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(machine.directory / "notify"))
        manager.settimeout(DEADLINE)
        variables = machine.environment | {"NOTIFY_SOCKET": str(machine.directory / "notify")}
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            with subprocess.Popen(start, env=variables, stderr=subprocess.DEVNULL) as service:
                assert manager.recv(100) == b"READY=1"
                assert served.exists()
                service.send_signal(number)
                assert service.wait(DEADLINE) == status
            subprocess.run(clear, env=machine.environment, stderr=subprocess.DEVNULL, check=False)
            assert find_mount(machine.directory / "mnt" / "models") is None


def test_the_line_of_fstab_mounts(machine: Machine) -> None:
    recipe, mountpoint, kind, options, *_ = machine.moved(blocks("fstab")[0]).split()
    # As mount(8) runs it.
    machine.run("/sbin/mount.fuse", recipe, mountpoint, "-o", f"rw,{options}", "-t", kind)
    entry = find_mount(Path(mountpoint))
    assert entry is not None
    assert entry.source == recipe
    machine.run("mergefs", "umount", mountpoint)


def test_the_pod_mounts_and_serves(machine: Machine) -> None:
    (manifest,) = blocks("yaml")
    (container,) = yaml.safe_load(manifest)["spec"]["containers"]
    (script,) = container["args"]
    served = machine.run(*container["command"], machine.moved(script))
    assert '"LlamaForCausalLM"' in served.stdout
    machine.run("mergefs", "umount", f"{machine.directory}/mnt/merged")


def test_the_container_mounts_and_serves(machine: Machine) -> None:
    (command,) = [text for text in blocks("sh") if text.startswith("docker") and "mergefs mount" in text]
    words = shlex.split(command.replace("\\\n", " "))
    served = machine.run(*map(machine.moved, words[words.index("IMAGE") + 1 :]))
    assert '"LlamaForCausalLM"' in served.stdout
    machine.run("mergefs", "umount", f"{machine.directory}/mnt/merged")


@pytest.mark.skipif(not _ROOT, reason="only root can do what a container's start does")
def test_a_container_sees_a_mount_of_the_host(machine: Machine) -> None:
    (command,) = [text for text in blocks("sh") if text.startswith("docker") and "mergefs mount" not in text]
    words = [machine.moved(word) for word in shlex.split(command)]
    source, target, how = words[words.index("-v") + 1].split(":")
    propagation = how.removeprefix("ro,r")
    machine.run("mergefs", "mount", "--allow-other", f"{machine.directory}/recipes", source)
    enter = ["unshare", "--mount", "--propagation", propagation, "sh", "-euc"]
    served = machine.run(*enter, f"mount --bind -o ro '{source}' '{target}' && exec {shlex.join(words[-3:])}")
    assert '"LlamaForCausalLM"' in served.stdout
    machine.run("mergefs", "umount", source)


@functools.cache
def sentences() -> frozenset[str]:
    """Return every text in the package's sources, with ``…`` for what is put in, as one reads it."""
    found = set()
    for path in Path(mergefs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"\{\w*\}", "…", node.value))
    return frozenset(found)


def rows(after: str) -> list[str]:
    """Return the first column of the table that follows the line which begins with ``after``."""
    table = DOCUMENT.split(f"\n{after}", 1)[1].split("\n\n")[1]
    return [re.sub(r"^`|`$", "", line.split(" | ")[0].removeprefix("| ")) for line in table.splitlines()[2:]]


@pytest.mark.parametrize("message", rows("Messages of mergefs"))
def test_a_message_is_one_that_mergefs_has(message: str) -> None:
    assert any(message.replace(" (…)", "") in one.replace(" (…)", "") for one in sentences()), message


@pytest.mark.parametrize("error", rows("Errors that a program gets"))
def test_an_error_is_one_that_the_system_has(error: str) -> None:
    assert error in {os.strerror(code) for code in errno.errorcode}


def test_links_lead_to_headings() -> None:
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in DOCUMENT.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", DOCUMENT)) <= headings
