"""Many processes at work on one catalog, some of them killed: what each gives must be right, and the catalog whole."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import family
from mounting import adopt_orphans, clear_mounts_below, environment
from recipes import MERGES, write_recipe

WEIGHTS = "model.safetensors"
_KILLED_OF = 3
"""One in so many commands is killed."""
_LONGEST_LIFE = 4.0
"""Seconds within which a command that is to be killed is."""
_DEADLINE = 240
_COMMANDS = ("analyze", "plan", "materialize", "mount", "check", "gc")


@dataclass(frozen=True, slots=True)
class Job:
    """One merge: the recipe, what it is planned with, and the hash of its weights."""

    recipe: Path
    options: tuple[str, ...]
    expected: str


@dataclass
class Soak:
    """The state that all workers share."""

    directory: Path
    jobs: tuple[Job, ...]
    analysed: tuple[Path, ...]
    stop: float
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> Mapping[str, str]:
        """That of every command: one catalog for all."""
        return environment(self.directory / "state", {"MERGEFS_CATALOG": str(self.directory / "catalog")})

    def note(self, outcome: str, failure: str | None = None) -> None:
        """Count an outcome."""
        with self.lock:
            self.outcomes[outcome] += 1
            if failure is not None:
                self.failures.append(f"{outcome}: {failure}")


def hash_of(path: Path) -> str:
    """Return a hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(directory: Path) -> tuple[tuple[Job, ...], tuple[Path, ...]]:
    """Write models and recipes, and compute every merge with a catalog of its own.

    Planes are coded for one family alone, so that what a budget buys of the other does not depend on who came first.
    """
    jobs, analysed = [], []
    for name, seed, options in (("bought", 0, ("--budget", "50%")), ("whole", 500, ())):
        models = family(directory / name, experts=2, dtype=torch.bfloat16, tied=False, shards=1, seed=seed, layers=2)
        for method in ("ties", "task_arithmetic", "slerp"):
            recipe = write_recipe(directory / name / f"{method}.yml", MERGES[method], models)
            out = directory / name / f"{method}-expected"
            command = [sys.executable, "-m", "mergefs.cli", "materialize", *options, recipe, out]
            extra = {"MERGEFS_CATALOG": str(directory / name / f"{method}-catalog")}
            subprocess.run(command, env=environment(directory, extra), check=True, stdout=subprocess.DEVNULL)
            jobs.append(Job(recipe, options, hash_of(out / WEIGHTS)))
            if not options:
                analysed.append(recipe)
    return tuple(jobs), tuple(analysed)


class Worker:
    """Runs one command after another, each drawn at random."""

    def __init__(self, soak: Soak, number: int, seed: int) -> None:
        self.soak = soak
        self.chance = random.Random(f"{seed} {number}")
        self.place = soak.directory / f"worker-{number}"
        self.place.mkdir()

    def run(self) -> None:
        """Work until time is up."""
        while time.monotonic() < self.soak.stop:
            self.chance.choice(
                (self.analyze, self.plan, self.materialize, self.materialize, self.mount, self.mount, self.keep_house)
            )()

    def command(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str] | None":
        """Run a command; None when it was killed. One that ends by itself must end well."""
        process = subprocess.Popen(
            [sys.executable, "-m", "mergefs.cli", *map(str, arguments)],
            env=self.soak.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        name = next(str(one) for one in arguments if one in _COMMANDS)
        life = self.chance.uniform(0, _LONGEST_LIFE) if self.chance.randrange(_KILLED_OF) == 0 else None
        try:
            output, errors = process.communicate(timeout=_DEADLINE if life is None else life)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self.soak.note(f"{name}: killed", None if life is not None else "it did not end")
            return None
        if process.returncode and "was removed from" in errors and "run the command again" in errors:
            self.soak.note(f"{name}: told to run again, since gc has removed the plan")
            return None
        failure = None if process.returncode == 0 else f"status {process.returncode}: {errors}"
        self.soak.note(f"{name}: done" if failure is None else f"{name}: failed", failure)
        return subprocess.CompletedProcess([], process.returncode, output, errors)

    def compare(self, what: str, job: Job, weights: Path) -> None:
        """Hold the weights of a merge against those of a clean run."""
        right = hash_of(weights) == job.expected
        self.soak.note(f"{what}: {'right' if right else 'wrong'} bytes", None if right else str(job))

    def analyze(self) -> None:
        """Gather statistics, with planes."""
        self.command("analyze", self.chance.choice(self.soak.analysed), "--planes", str(self.chance.randint(1, 2)))

    def keep_house(self) -> None:
        """Check the catalog while others are at work, or remove what nothing needs at this moment."""
        self.command("catalog", *self.chance.choice((("check",), ("gc", "--older-than", "0"), ("gc", "--compact"))))

    def plan(self) -> None:
        """Make a plan."""
        job = self.chance.choice(self.soak.jobs)
        self.command("plan", *job.options, job.recipe)

    def materialize(self) -> None:
        """Write a model, or go on with what a run that was killed has left."""
        job = self.chance.choice(self.soak.jobs)
        out = self.place / f"{self.soak.jobs.index(job)}"
        how = self.chance.choice(("--resume", "--fresh"))
        done = self.command("materialize", "--overwrite", how, *job.options, job.recipe, out)
        if done is not None and done.returncode == 0:
            self.compare("materialize", job, out / WEIGHTS)

    def mount(self) -> None:
        """Mount a model, read it, and take it away; or kill its server."""
        job = self.chance.choice(self.soak.jobs)
        mountpoint = self.place / "mount"
        mountpoint.mkdir(exist_ok=True)
        log = self.place / "mount.log"
        log.unlink(missing_ok=True)
        done = self.command("--log-file", log, "mount", *job.options, job.recipe, mountpoint)
        if done is not None and done.returncode == 0:
            self.compare("mount", job, mountpoint / WEIGHTS)
            if self.chance.randrange(_KILLED_OF) == 0:
                os.kill(self.server(log), signal.SIGKILL)
                self.soak.note("mount: server killed")
        self.clear(mountpoint, log)

    def clear(self, mountpoint: Path, log: Path) -> None:
        """Take away what is mounted, and wait for the server."""
        with contextlib.suppress(subprocess.CalledProcessError):  # its server may be taking it away at this moment
            clear_mounts_below(mountpoint)
        if log.exists() and (server := self.server(log)):
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(server, signal.SIGTERM)
                os.waitpid(server, 0)

    def server(self, log: Path) -> int:
        """Return the process that serves, 0 where none has come so far."""
        found = re.search(r"as process (\d+)", log.read_text())
        return int(found[1]) if found else 0


def soak(directory: Path, seconds: float, processes: int, seed: int) -> dict[str, Any]:
    """Work for so many ``seconds`` and return the figures: outcomes of commands, and every failure.

    At the end the catalog must be found as it must be, by the check that no repair came before, and every merge be
    right with it; and once more after what nothing needs has been removed.
    """
    adopt_orphans()
    jobs, analysed = prepare(directory)
    shared = Soak(directory, jobs, analysed, time.monotonic() + seconds)
    workers = [Worker(shared, number, seed) for number in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(worker.run) for worker in workers]:
            future.result()
    _kill_orphans()
    clear_mounts_below(directory)
    for step in ("after the work", "after gc"):
        _examine(shared, step)
        _run(shared, step, "catalog", "gc", "--older-than", "0", "--compact")
    return {
        "seconds": seconds,
        "processes": processes,
        "outcomes": dict(sorted(shared.outcomes.items())),
        "failures": shared.failures,
    }


def _examine(shared: Soak, step: str) -> None:
    """Check the catalog, and every merge with it."""
    _run(shared, step, "catalog", "check", "--json", judge=lambda said: not json.loads(said)["findings"])
    for number, job in enumerate(shared.jobs):
        out = shared.directory / f"{step}-{number}".replace(" ", "-")
        if _run(shared, step, "materialize", *job.options, job.recipe, out):
            right = hash_of(out / WEIGHTS) == job.expected
            shared.note(f"{step}: {'right' if right else 'wrong'} bytes", None if right else str(job))


def _run(shared: Soak, step: str, *arguments: str | Path, judge: Callable[[str], bool] = lambda said: True) -> bool:
    """Run a command that must end well."""
    finished = subprocess.run(
        [sys.executable, "-m", "mergefs.cli", *map(str, arguments)],
        env=shared.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    fine = finished.returncode == 0 and judge(finished.stdout)
    name = f"{step}: {arguments[0]} {arguments[1] if arguments[0] == 'catalog' else ''}".strip()
    shared.note(f"{name} {'fine' if fine else 'failed'}", None if fine else finished.stdout + finished.stderr)
    return fine


def _kill_orphans() -> None:
    """End the children of killed commands that this process has adopted: servers that nobody knows of."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in map(int, children):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
