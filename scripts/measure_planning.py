#!/usr/bin/env python3
"""Measures planning under a budget: numbers alone, and a family of 70 billion parameters from the command line.

``allocation`` takes 1.1 million pairs of an expert and a block, with eight experts in each block that are correlated
with each other, from sketches to the blocks that are bought. ``family`` writes a base and eight experts with the shapes
of a Llama of 70 billion parameters as sparse files, puts made-up statistics of them into a catalog (norms, sketches and
hashes of all blocks), and runs ``mergefs plan RECIPE --budget 25%``. The method is linear in the deltas, so that
everything follows from statistics; others are measured on some blocks of the files, which hold nothing here.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/measure_planning.py``.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
from bench.made_statistics import fill_catalog, made_deltas
from bench.processes import environment, scratch
from bench.shapes import LLAMA_70B, Shape
from bench.sparse import write_sparse_family

from mergefs.planner.allocation import Offer, allocate, correlations
from mergefs.statistics.blocks import BlockDeltas

PAIRS: Final = 1_100_000
EXPERTS: Final = 8
BLOCKS_OF_A_TENSOR: Final = 448
BLOCK_BYTES: Final = 2**20
BUDGET: Final = 0.25


@dataclass(frozen=True, slots=True)
class Family:
    """What one run of ``mergefs plan`` took: seconds on the clock and of processors, and the most memory in bytes."""

    seconds: float
    processor_seconds: float
    memory: int


def made_offers(deltas: Sequence[Sequence[BlockDeltas]]) -> list[Offer]:
    """Return the offers of tensors with these deltas, whose blocks cost the same."""
    factors = np.array([0.5, 0.3, 0.4, -0.3, 0.2, 0.6, 0.3, -0.4])
    offers = []
    for tensor in deltas:
        blocks = len(tensor[0].squared_norms)
        shape = (EXPERTS, blocks)
        offers.append(
            Offer(
                factors=factors,
                spreads=np.zeros(EXPERTS),
                energies=np.stack([known.squared_norms for known in tensor]).astype(np.float64),
                correlations=correlations([known.sketches for known in tensor]),
                givers=np.repeat(np.arange(EXPERTS, dtype=np.int16)[:, np.newaxis], blocks, axis=1),
                is_open=np.ones(shape, dtype=np.bool_),
                prices=np.full((*shape, 2), [0, BLOCK_BYTES], dtype=np.int64),
                shares=np.full((*shape, 2), [1, 0], dtype=np.float32),
                unbought=np.zeros(blocks),
            )
        )
    return offers


def measure_allocation(repeat: int) -> tuple[float, list[tuple[float, float]], float]:
    """Return the seconds of the first run, those of the others (on the clock, of processors), and the error left."""
    generator = np.random.default_rng(0)
    blocks = PAIRS // EXPERTS
    sizes = [min(BLOCKS_OF_A_TENSOR, blocks - first) for first in range(0, blocks, BLOCKS_OF_A_TENSOR)]
    deltas = [made_deltas(generator, size, EXPERTS) for size in sizes]
    limit = int(BUDGET * EXPERTS * blocks * BLOCK_BYTES)

    def once() -> tuple[float, float, float]:
        started, used = time.perf_counter(), time.process_time()
        bought = allocate(made_offers(deltas), limit)
        return time.perf_counter() - started, time.process_time() - used, (bought.left / bought.total) ** 0.5

    first, _, error = once()
    return first, [once()[:2] for _ in range(repeat)], error


def plan_once(recipe: Path, variables: dict[str, str]) -> Family:
    """Run ``mergefs plan`` under a budget and return what it took; the kernel counts its memory."""
    command = [sys.executable, "-m", "mergefs", "plan", str(recipe), "--budget", f"{BUDGET:.0%}", "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if process.stdout is None:
        raise RuntimeError("the output of a process is not there")
    with process.stdout as output:
        outcome = json.loads(output.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or outcome["analysis_bytes_read"]:
        raise click.ClickException(f"mergefs plan {recipe} did not plan from what the catalog knows")
    return Family(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def write_recipe(family: Path, number: int) -> Path:
    """Write a recipe of task_arithmetic beside that of a family; each number has weights of its own."""
    document = json.loads(family.read_text()) | {"merge_method": "task_arithmetic"}
    for position, entry in enumerate(document["models"]):
        entry["parameters"] = {"weight": 0.3 + position / 20 + number / 100}
    recipe = family.with_name(f"recipe-{number}.yml")
    recipe.write_text(json.dumps(document))
    return recipe


def measure_family(shape: Shape, where: Path | None, repeat: int) -> list[Family]:
    """Return what each plan took; the catalog has none of them yet."""
    with scratch(where) as directory:
        family, parameters = write_sparse_family(directory, shape, EXPERTS)
        click.echo(f"{EXPERTS} experts of {parameters / 1e9:.1f} billion parameters", err=True)
        fill_catalog(family, directory / "catalog")
        variables = environment(directory)
        return [plan_once(write_recipe(family, number), variables) for number in range(repeat + 1)]


def line(name: str, seconds: Sequence[float], target: float) -> str:
    """Return one line of the report."""
    every = ", ".join(f"{one:.2f}" for one in seconds)
    return f"{name}: median {statistics.median(seconds):.2f} s of {every} (to stay below {target:g} s)"


@click.group()
def main() -> None:
    """Measure planning under a budget."""
    click.echo(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    )


@main.command()
@click.option("--repeat", default=5, show_default=True, help="How often to measure.")
def allocation(repeat: int) -> None:
    """Buy from 1.1 million pairs of an expert and a block."""
    first, others, error = measure_allocation(repeat)
    click.echo(line(f"{PAIRS:,} pairs, {EXPERTS} experts", [clock for clock, _ in others], 3))
    click.echo(line("  of processors", [used for _, used in others], 3))
    click.echo(f"the first run, with loading or compiling kernels: {first:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"relative error left at {BUDGET:.0%}: {error:.4f}; memory {peak / 1e9:.2f} GB, with what was made up")


@main.command()
@click.option("--repeat", default=3, show_default=True, help="How often to measure.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to make the family.")
def family(repeat: int, directory: Path | None) -> None:
    """Plan a family of 70 billion parameters with eight experts."""
    first, *others = measure_family(LLAMA_70B, directory, repeat)
    click.echo(line(f"mergefs plan --budget {BUDGET:.0%}", [run.seconds for run in others], 10))
    click.echo(line("  of processors", [run.processor_seconds for run in others], 10))
    peak = max(run.memory for run in (first, *others))
    click.echo(f"  the first run: {first.seconds:.2f} s; memory {peak / 1e9:.2f} GB (to stay below 1 GB)")


if __name__ == "__main__":
    main()
