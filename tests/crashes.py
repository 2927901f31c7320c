"""Commands that die at a system call of choice, at a moment of chance, or by a loss of power, and what they leave."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from checkpoints import Family, family
from mounting import environment
from recipes import MERGES, write_recipe

from mergefs.catalog import Catalog
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.verify import verify

_SERVER: Final = Path(__file__).with_name("command_server.py")

CHANGING: Final = (
    *("write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "copy_file_range", "sendfile"),
    *("fsync", "fdatasync", "sync_file_range", "msync", "syncfs"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("mkdir", "mkdirat", "rmdir", "unlink", "unlinkat"),
)
"""Every system call that writes, syncs or renames, or makes or removes a name."""

_CALL: Final = re.compile(r"(?P<pid>\d+)\s+(?P<name>\w+)\(")


class CommandServer:
    """Forks commands from a process that has imported everything, one at a time.

    ``first`` is the command that it runs itself, with this catalog.
    """

    def __init__(self, directory: Path, *first: str | Path, catalog: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(directory / "state"),
        )
        status = int(self._say(json.dumps(self._request(first, catalog))))
        assert status == 0, self.output.read_text()

    def run(self, *arguments: str | Path, catalog: Path, expected: int = 0) -> str:
        """Run a command to its end, and return what it has printed."""
        self._begin(arguments, catalog)
        self._let_go()
        status = self._end()
        printed = self.output.read_text()
        assert status == expected, printed
        return printed

    def run_traced(self, options: Sequence[str], *arguments: str | Path, catalog: Path) -> int:
        """Run a command under strace with these options, and return its exit status."""
        pid = self._begin(arguments, catalog)
        strace = subprocess.Popen(
            ["strace", "-f", *options, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert strace.stderr is not None
        attached = strace.stderr.readline()
        assert "attached" in attached, attached
        self._let_go()
        status = self._end()
        strace.communicate(timeout=60)
        return status

    def run_and_kill(self, seconds: float, *arguments: str | Path, catalog: Path) -> int:
        """Run a command and kill it after some time, unless it has ended; return its exit status."""
        pid = self._begin(arguments, catalog)
        killer = threading.Timer(seconds, _kill, (pid,))
        self._let_go()
        killer.start()
        status = self._end()
        killer.cancel()
        killer.join()
        return status

    @property
    def output(self) -> Path:
        """What the last command has printed."""
        return self._directory / "output"

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=60)

    def _begin(self, arguments: Sequence[str | Path], catalog: Path) -> int:
        return int(self._say(json.dumps(self._request(arguments, catalog))))

    def _request(self, arguments: Sequence[str | Path], catalog: Path) -> dict[str, object]:
        return {
            "arguments": list(map(str, arguments)),
            "environment": {"MERGEFS_CATALOG": str(catalog)},
            "output": str(self.output),
        }

    def _let_go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def _end(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _kill(pid: int) -> None:
    """Kill a process, unless it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def command_server(directory: Path, *first: str | Path, catalog: Path) -> Iterator[CommandServer]:
    """Lend a server of commands."""
    server = CommandServer(directory, *first, catalog=catalog)
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True, slots=True)
class Point:
    """The n-th time that a thread of a command makes a system call."""

    call: str
    number: int

    @property
    def options(self) -> list[str]:
        """What lets strace kill a process there, before the call is made."""
        calls = ",".join(CHANGING)
        inject = f"inject={self.call}:signal=KILL:when={self.number}"
        return ["-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]


def points(log: Path) -> list[Point]:
    """Return every point at which a command can die that strace has written this log of."""
    most: dict[str, int] = {}
    by_thread: Counter[tuple[str, str]] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        call = _CALL.match(line)
        if call is not None and call["name"] in CHANGING:  # strace also tells of calls that it has no name for
            by_thread[call["pid"], call["name"]] += 1
            most[call["name"]] = max(most.get(call["name"], 0), by_thread[call["pid"], call["name"]])
    return [Point(name, number) for name in sorted(most) for number in range(1, most[name] + 1)]


def counting(log: Path) -> list[str]:
    """Return the options with which strace writes the log that ``points`` reads."""
    return ["-o", str(log), "--string-limit=0", "-e", f"trace={','.join(CHANGING)}"]


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a model is written that may die: over an old model, or where nothing is."""

    server: CommandServer
    directory: Path
    catalogs: Path
    recipe: Path
    old_model: Path | None
    expected: str

    @property
    def place(self) -> Path:
        """The directory above the destination; nothing else may stay in it."""
        return self.directory / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def catalog(self) -> Path:
        return self.catalogs / "catalog"

    @property
    def command(self) -> tuple[str | Path, ...]:
        return ("materialize", "--resume", "--overwrite", self.recipe, self.out)

    def prepare(self) -> None:
        """Bring back the old state, with a catalog that knows the hashes of the inputs."""
        for path in (self.place, self.catalog):
            shutil.rmtree(path, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.catalogs / "known", self.catalog)
        if self.old_model is not None:
            shutil.copytree(self.old_model, self.out)

    def check(self) -> str:
        """Assert that the destination is absent, old or new, and sound; return which."""
        if not self.out.exists():
            assert self.old_model is None
            return "absent"
        found = verify(self.out).manifest
        assert found in ([] if self.old_model is None else [manifest_hash(self.old_model)]) + [self.expected]
        return "new" if found == self.expected else "old"

    def recover(self) -> None:
        """Run the command again, and assert that all is as it should be in the end."""
        self.server.run(*self.command, catalog=self.catalog)
        assert verify(self.out).manifest == self.expected
        assert [path.name for path in self.place.iterdir()] == ["out"]
        with Catalog(self.catalog) as catalog:
            assert {one.state for one in catalog.transactions()} <= {"committed", "aborted"}


def crash_models(directory: Path) -> Family:
    """Return models of three pieces."""
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1, hidden=128, layers=1, vocabulary=4500
    )


@contextmanager
def crash_stages(models: Family, directory: Path, catalogs: Path) -> Iterator[dict[str, Stage]]:
    """Lend two stages by name: with nothing at the destination, and with another model there."""
    known = catalogs / "known"
    recipe = write_recipe(directory / "recipe.yml", MERGES["task_arithmetic"], models)
    other = write_recipe(directory / "other.yml", MERGES["linear without a base"], models)
    with command_server(directory, "materialize", recipe, directory / "expected", catalog=known) as server:
        server.run("materialize", other, directory / "old", catalog=known)
        expected = manifest_hash(directory / "expected")
        assert expected is not None
        yield {
            name: Stage(server, directory, catalogs, recipe, old, expected)
            for name, old in (("absent", None), ("replaced", directory / "old"))
        }


def die_at_random_times(stage: Stage, times: int, chance: random.Random) -> dict[str, int]:
    """Kill the command at random times, and recover; return how often which state was left."""
    left = {"absent": 0, "old": 0, "new": 0}
    stage.prepare()
    started = time.monotonic()
    stage.server.run(*stage.command, catalog=stage.catalog)
    longest = 1.2 * (time.monotonic() - started)
    for _ in range(times):
        stage.prepare()
        stage.server.run_and_kill(chance.uniform(0, longest), *stage.command, catalog=stage.catalog)
        left[stage.check()] += 1
        stage.recover()
    return left
