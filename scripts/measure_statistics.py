#!/usr/bin/env python3
"""Measures the analysis: the bytes that the statistics of an expert take in the catalog, and the speed of the pass.

It makes a base and two experts of it in a temporary directory, in BF16 and of the shapes of a Llama of 1.1 billion
parameters, whose deltas are of low rank with noise around it and tails that are heavier than Gaussian; half of the
tensors of the second expert are the base's. It analyses the base, and then one expert after the other.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/measure_statistics.py``.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import lmdb
import numpy as np
from bench.shapes import Shape
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.catalog import Catalog
from mergefs.catalog.schema import SCHEMA
from mergefs.checkpoint.dtypes import BF16
from mergefs.checkpoint.header import encode_header
from mergefs.engine.workspace import Workspace
from mergefs.kernels.precision import round_to_bfloat16_bits, widen_bfloat16_bits
from mergefs.planner.build import PlanOptions, analyze_draft, draft_plan
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.statistics.gathering import meter

BLOCK: Final = 1 << 20
RANK: Final = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One analysis: bytes that were read, seconds on the clock and of processors, and what the catalog grew by."""

    name: str
    read: int
    seconds: float
    processor_seconds: float
    record_bytes: int
    page_bytes: int


def main_tensors(shape: Shape, seed: int) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Yield the tensors of a base."""
    generator = np.random.default_rng(seed)
    for name, dimensions in shape.tensors().items():
        values = generator.standard_normal(math.prod(dimensions), dtype=np.float32)
        values = 1 + values * np.float32(0.1) if len(dimensions) == 1 else values * np.float32(0.02)
        yield name, round_to_bfloat16_bits(values).reshape(dimensions)


def fine_tuned(
    tensors: Iterator[tuple[str, NDArray[np.uint16]]], seed: int, frozen: Callable[[int], bool]
) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Yield the tensors of an expert; of ``tensors``, those whose number is ``frozen`` stay as they are."""
    generator = np.random.default_rng(seed)
    for number, (name, bits) in enumerate(tensors):
        if frozen(number):
            yield name, bits
            continue
        size = np.float32(10 ** generator.uniform(-3.8, -3.0))
        noise = generator.standard_normal(bits.shape, dtype=np.float32)
        delta = noise * np.abs(noise) * (size / 2)
        if bits.ndim == 2:
            left = generator.standard_normal((bits.shape[0], RANK), dtype=np.float32)
            right = generator.standard_normal((RANK, bits.shape[1]), dtype=np.float32)
            delta += left @ right * (size / np.float32(math.sqrt(RANK)))
        yield name, round_to_bfloat16_bits(widen_bfloat16_bits(bits) + delta)


def write_model(directory: Path, shape: Shape, tensors: Iterator[tuple[str, NDArray[np.uint16]]]) -> int:
    """Write a model of one file, and return the bytes of its tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape.config()))
    header = encode_header([(name, BF16, dimensions) for name, dimensions in shape.tensors().items()], {"format": "pt"})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        for _, bits in tensors:
            file.write(bits.tobytes())
        return file.tell() - len(header)


def statistics_bytes(catalog: Path) -> tuple[int, int]:
    """Return the bytes of keys and values of all statistics, and of the pages that their tables take."""
    records = pages = 0
    with lmdb.open(str(catalog), max_dbs=len(SCHEMA) + 1, readonly=True, lock=False) as environment:
        for name in ("contents", "deltas", "norms", "twins", "histograms"):
            table = environment.open_db(name.encode(), create=False)
            with environment.begin(db=table) as transaction:
                found = transaction.stat(table)
                pages += found["psize"] * (found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"])
                records += sum(len(key) + len(value) for key, value in transaction.cursor())
    return records, pages


def analysed(name: str, models: list[Path], base: Path, catalog: Path) -> Step:
    """Analyse ``models`` against ``base``."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    document: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}
    recipe = base.parent / "recipe.yml"
    recipe.write_text(json.dumps(document | {"dtype": "bfloat16"}))
    before = statistics_bytes(catalog) if (catalog / "data.mdb").exists() else (0, 0)
    workspace = Workspace.create(Catalog(catalog))
    try:
        draft = draft_plan(load_recipe(recipe), PlanOptions(), workspace)
        start, processor = time.perf_counter(), time.process_time()
        analyze_draft(draft, workspace, Silence())
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor
        read = workspace.ledger.totals().analysis_bytes_read
    finally:
        workspace.close()
    after = statistics_bytes(catalog)
    return Step(name, read, seconds, processor_seconds, after[0] - before[0], after[1] - before[1])


def parts(expert: Path, base: Path) -> dict[str, float]:
    """Return the seconds of a processor that the parts of the pass take for each byte of an expert and its base."""
    blocks = 256
    meters = meter(BF16)
    took = {"reading": 0.0, "hashing": 0.0, "measuring": 0.0}
    with (base / "model.safetensors").open("rb") as first, (expert / "model.safetensors").open("rb") as second:
        for block in range(blocks):
            start = time.thread_time()
            raws = [np.fromfile(file, dtype=np.uint8, count=BLOCK) for file in (first, second)]
            read = time.thread_time()
            for raw in raws:
                blake3(raw.data).digest()
            hashed = time.thread_time()
            meters.measure(raws[1], raws[0], block * BLOCK // 2)
            took["reading"] += read - start
            took["hashing"] += hashed - read
            took["measuring"] += time.thread_time() - hashed
    return {name: seconds / (2 * blocks * BLOCK) for name, seconds in took.items()}


@click.command()
@click.option("--layers", default=22, show_default=True, help="Layers of the models.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where the temporary directory is made.")
def command(layers: int, directory: Path | None) -> None:
    """Make models, analyse them and print what that took."""
    shape = Shape(hidden=2048, intermediate=5632, layers=layers, heads=32, key_value_heads=4, vocabulary=32000)
    meter(BF16)  # compiles, or loads from the cache
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        base, full, half = (Path(temporary) / name for name in ("base", "expert", "half-frozen"))
        size = write_model(base, shape, main_tensors(shape, 1))
        write_model(full, shape, fine_tuned(main_tensors(shape, 1), 2, lambda number: False))
        write_model(half, shape, fine_tuned(main_tensors(shape, 1), 3, lambda number: number % 2 == 0))
        catalog = Path(temporary) / "catalog"
        steps = [
            analysed("base and its first expert", [full], base, catalog),
            analysed("an expert that is half frozen", [half], base, catalog),
            analysed("all of them again", [full, half], base, catalog),
        ]
        shares = parts(full, base)
    click.echo(f"each model has {size:,} bytes of tensors, {len(shape.tensors())} of them")
    for step in steps:
        speed = step.read / max(step.processor_seconds, 1e-9) / 1e9
        click.echo(f"{step.name}: read {step.read:,} bytes in {step.seconds:.2f} s")
        click.echo(f"  {step.processor_seconds:.2f} s of processors: {speed:.2f} GB/s of a core")
        click.echo(
            f"  statistics: {step.record_bytes:,} bytes of records ({step.record_bytes / size:.4%} of a model), "
            f"{step.page_bytes:,} of pages ({step.page_bytes / size:.4%})"
        )
    total = sum(shares.values())
    for name, seconds in shares.items():
        click.echo(f"{name}: {1 / seconds / 1e9:.2f} GB/s of a core, {seconds / total:.0%} of the pass")
    click.echo(f"all three: {1 / total / 1e9:.2f} GB/s of a core")


if __name__ == "__main__":
    command()
