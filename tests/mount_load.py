"""A mount under load: many processes read random pages of many variants of one mount, over sources on a slow disk.

``loaded_models`` makes models, recipes, and what each variant must be; ``load`` mounts, reads, watches, and returns its
figures. scripts/soak/load.py prints them.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from checkpoints import Family, family
from faulty_files import FaultyFiles, faulty_files
from load_reader import COUNTS, WEIGHTS
from mounting import ROOT, Mount, mounted_recipes, wait_for
from recipes import MERGES, write_recipe

import mergefs
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.unmount import read_status

VARIANTS: Final = (
    "ties",
    "ties@density=0.2",
    "ties@weight=0.3",
    "ties@density=0.7,weight.2=1.5",
    "arithmetic",
    "arithmetic@lambda=0.5",
    "arithmetic@method=dare_linear,density=0.5",
    "arithmetic@method=ties,density=0.9",
)
"""Two recipes, and variants of them by path."""

CACHE: Final = 64 * 2**20
"""The smallest cache that a mount takes: less than what the variants have together, so that blocks come and go."""

BESIDE_CACHE: Final = 200 * 10**6
"""Bytes by which a server may grow beside its cache: 64 MiB for blocks that are being computed, answers that the
kernel has not taken so far, stacks and memory pools of 64 threads, the kernels and what the plans of variants take."""

HANG: Final = 60.0
"""Seconds that no read takes, on however busy a machine."""

IDLE_THREADS: Final = 24
"""Threads of a server that has nothing to do: up to 16 of libfuse, and its own."""
SOURCE_FILES: Final = 9
"""Files that a server keeps open to read on: three models, each for up to three ways to read ahead."""

_LOOK: Final = 0.5
"""Seconds between two looks at whether everybody gets on."""
_KILL_EVERY: Final = 2.0
"""Seconds between two readers that are killed, on average."""


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """A directory of recipes over models on a slow disk, and one of the weights that each variant must have."""

    recipes: Path
    expected: Path
    disk: FaultyFiles


@dataclass
class Figures:
    """What a load has come to. Times in seconds, sizes in bytes."""

    seconds: float
    readers: int
    threads: int
    pages: int = 0
    reads: int = 0
    reads_per_second: float = 0.0
    slowest_read: float = 0.0
    readers_killed: int = 0
    memory_before: int = 0
    memory_peak: int = 0
    memory_allowed: int = 0
    bytes_served: int = 0
    source_bytes_read: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def loaded_models(directory: Path, delay: float, layers: int = 8) -> Iterator[LoadedModels]:
    """Write three models, and recipes for them as a disk shows them each of whose reads takes ``delay`` seconds."""
    models = family(
        directory / "models",
        experts=2,
        dtype=torch.bfloat16,
        tied=False,
        shards=1,
        hidden=256,
        layers=layers,
        vocabulary=4500,
    )
    with faulty_files(directory / "models", directory / "disk") as disk:
        slow = Family(disk.path / "base", tuple(disk.path / expert.name for expert in models.experts))
        for name, method in (("ties", "ties"), ("arithmetic", "task_arithmetic")):
            quick = write_recipe(directory / "quick" / f"{name}.yml", MERGES[method], models)
            write_recipe(directory / "recipes" / f"{name}.yml", MERGES[method], slow)
            for variant in (one for one in VARIANTS if one.split("@")[0] == name):
                (directory / "expected" / variant).mkdir(parents=True)
                with mergefs.open(f"{quick}{variant.removeprefix(name)}", catalog=directory / "catalog") as model:
                    (directory / "expected" / variant / WEIGHTS).write_bytes(model.read_file(WEIGHTS))
        disk.set("*", delay=delay)
        yield LoadedModels(directory / "recipes", directory / "expected", disk)


def load(models: LoadedModels, directory: Path, seconds: float, readers: int, threads: int, seed: int = 1) -> Figures:
    """Mount the recipes and let ``readers`` processes of so many ``threads`` read for ``seconds``, some of them killed.

    Found are: wrong bytes and errors, by the readers; a read that takes longer than HANG; more memory than the cache
    and BESIDE_CACHE; a log with an unexpected record; threads or open files that stay when the readers are gone.
    """
    figures = Figures(seconds, readers, threads)
    options = ["--cache-size", str(CACHE)]
    with mounted_recipes(
        models.recipes, mountpoint=directory / "mnt", state=directory / "state", options=options
    ) as mount:
        server = Server(mount.pid)
        for variant in VARIANTS:
            (mount.mountpoint / variant / WEIGHTS).stat()  # plans it
        figures.memory_before, descriptors = server.memory(), server.descriptors
        figures.memory_allowed = figures.memory_before + CACHE + BESIDE_CACHE
        begun = time.monotonic()
        Readers(models, mount, figures, random.Random(seed)).run()
        figures.reads_per_second = figures.reads / (time.monotonic() - begun)
        figures.memory_peak = server.memory("VmHWM")
        if figures.memory_peak > figures.memory_allowed:
            figures.failures.append(f"the server took {figures.memory_peak} bytes of memory")
        entry = find_mount(mount.mountpoint)
        assert entry is not None
        status = read_status(entry, HANG)
        figures.bytes_served = int(str(status["bytes_served"]))
        figures.source_bytes_read = sum(
            int(str(status[f"{name}_bytes_read"])) for name in ("expert", "base", "analysis")
        )
        wait_for(lambda: server.threads <= IDLE_THREADS, "the server's threads to end")
        wait_for(lambda: server.descriptors <= descriptors + SOURCE_FILES, "the server to close files")
    return figures


@dataclass(frozen=True, slots=True)
class Server:
    """What the kernel tells of a process."""

    pid: int

    def memory(self, what: str = "VmRSS") -> int:
        """Return the bytes that are in memory now, or were at most (VmHWM)."""
        return self._status(what) * 1024

    @property
    def threads(self) -> int:
        """How many threads there are."""
        return self._status("Threads")

    @property
    def descriptors(self) -> int:
        """How many files are open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 (names that are gone a moment later)

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Readers:
    """The processes that read, and the watch over them."""

    def __init__(self, models: LoadedModels, mount: Mount, figures: Figures, chance: random.Random) -> None:
        self.models = models
        self.mount = mount
        self.figures = figures
        self.chance = chance
        self.progress = mount.control / "progress"
        self.progress.write_bytes(bytes(COUNTS.size * figures.readers * figures.threads))
        self.stop = time.monotonic() + figures.seconds
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.begun: dict[int, int] = {}

    def run(self) -> None:
        """Read until time is up; every failure is in the figures."""
        try:
            for number in range(self.figures.readers):
                self.start(number)
            while self.running:
                self.watch()
        finally:
            for process in self.running.values():
                process.kill()
                process.communicate()

    def start(self, number: int) -> None:
        """Start the reader of a number."""
        places = (number * self.figures.threads, self.figures.threads)
        seed = self.chance.random()
        self.begun[number] = time.monotonic_ns()
        arguments = [seed, self.stop, *places, self.progress, self.mount.mountpoint, self.models.expected, *VARIANTS]
        self.running[number] = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "load_reader.py", *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def watch(self) -> None:
        """Wait for a moment or a reader's end; see to readers that have ended or hang; now and then, kill one."""
        with ExitStack() as stack:
            poll = select.poll()
            for process in self.running.values():
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                poll.register(descriptor, select.POLLIN)
            poll.poll(_LOOK * 1000)
        for number in [number for number, process in self.running.items() if process.poll() is not None]:
            self.end(number, killed=False)
        hanging = [number for number in self.running if self.longest_wait(number) > HANG]
        if hanging:
            self.mount.kill(signal.SIGUSR1)
            self.mount.allowed.append("")
            self.figures.failures.append(f"{len(hanging)} readers got nothing for {HANG} s: {self.mount.log_file}")
            for process in self.running.values():
                process.kill()
            self.stop = 0.0
        elif self.chance.random() < _LOOK / _KILL_EVERY and self.stop - time.monotonic() > _KILL_EVERY:
            number = self.chance.choice(sorted(self.running))
            self.running[number].kill()
            self.end(number, killed=True)
            self.start(number)

    def end(self, number: int, killed: bool) -> None:
        """Take what a reader has counted, and what it says."""
        process = self.running.pop(number)
        said, _ = process.communicate()
        if killed:
            self.figures.readers_killed += 1
        if said or not (killed or process.returncode == 0):
            self.figures.failures.append(f"a reader ended with status {process.returncode}: {said}")
        for pages, reads, slowest, _ in self.counts(number):
            self.figures.pages += pages
            self.figures.reads += reads
            self.figures.slowest_read = max(self.figures.slowest_read, slowest / 1e9)
            if not killed and not reads:
                self.figures.failures.append("a thread has read nothing")
        self.write(number, bytes(COUNTS.size * self.figures.threads))

    def counts(self, number: int) -> list[tuple[int, ...]]:
        """Return the counts of each thread of a reader."""
        size = COUNTS.size * self.figures.threads
        with self.progress.open("rb") as file:
            return list(COUNTS.iter_unpack(os.pread(file.fileno(), size, number * size)))

    def write(self, number: int, counts: bytes) -> None:
        """Put counts in the place of those of a reader."""
        with self.progress.open("r+b") as file:
            os.pwrite(file.fileno(), counts, number * len(counts))

    def longest_wait(self, number: int) -> float:
        """Return for how many seconds the slowest thread of a reader has had nothing."""
        last = min(max(ended, self.begun[number]) for *_, ended in self.counts(number))
        return (time.monotonic_ns() - last) / 1e9
