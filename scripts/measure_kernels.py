#!/usr/bin/env python3
"""Measures each merge method on one core: its kernel over blocks in memory, and what it needs to know of whole tensors.

Speeds are in GB/s of bytes touched, by the processor's time: of a kernel all inputs and the output, of statistics all
inputs once, whatever the number of passes (which stands beside it: bytes read through bytes of the inputs). Inputs have
deltas as fine-tuning leaves them, many of them no larger than a step of BF16.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/measure_kernels.py``.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from mergefs.catalog import Catalog
from mergefs.checkpoint.dtypes import BF16, F16, F32, DType
from mergefs.engine.compute import run_kernel
from mergefs.kernels.fused import prepare
from mergefs.kernels.precision import Raw, load, store
from mergefs.methods.contract import Answers, Method, TensorContext
from mergefs.methods.registry import METHODS
from mergefs.sources.blocks import BLOCK_ELEMENTS, BlockGrid
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.place import Place, Role
from mergefs.sources.reader import SourceReader
from mergefs.statistics.service import StatisticsService

ROW: Final = 4096
DTYPES: Final = {"bf16": BF16, "fp16": F16, "fp32": F32}
GLOBAL: Final[dict[str, dict[str, float]]] = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.01}, "sce": {"select_topk": 0.5}}
"""Parameters whose defaults would say little, or that have none."""

PER_MODEL: Final[dict[str, float]] = {"weight": 0.3, "density": 0.5, "epsilon": 0.1}


@dataclass(frozen=True, slots=True)
class Held(Place):
    """A tensor whose bytes are in memory; ``number`` tells it from others."""

    number: int
    bytes: Raw
    of: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.bytes.size // self.of.itemsize // ROW, ROW)

    @property
    def dtype(self) -> DType:
        return self.of

    @property
    def parts(self) -> tuple[Place, ...]:
        return ()

    @property
    def formula(self) -> bytes:
        return f"held {self.number}".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        PASSED[0] += (stop - start) * self.of.itemsize
        return self.bytes[start * self.of.itemsize : stop * self.of.itemsize]

    def bytes_read(self, grid: BlockGrid, role: Role) -> Any:
        return np.zeros(grid.count, dtype=np.int64)

    def describe(self) -> str:
        return f"tensor {self.number} in memory"


PASSED: Final = [0]
"""Bytes that have been read of tensors in memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one method: GB/s of one core, and how often the statistics read their inputs."""

    method: str
    dtype: str
    experts: int
    fused: bool
    kernel: float
    statistics: float | None
    passes: float | None


def inputs(count: int, elements: int, dtype: DType) -> tuple[Raw, ...]:
    """Return a base and ``count`` experts of it."""
    generator = np.random.default_rng(7)
    base = generator.standard_normal(elements, dtype=np.float32) * np.float32(0.02)
    made = [store(base, F32, dtype)]
    origin = load(made[0], dtype, F32)
    for _ in range(count):
        noise = generator.standard_normal(elements, dtype=np.float32)
        made.append(store(origin + noise * np.abs(noise) * np.float32(2e-4), F32, dtype))
    return tuple(made)


def context_of(method: Method[Any], size: int, dtype: DType, models: int) -> TensorContext:
    """Return what ``method`` is asked to do with a base, the first of so many models, and the others."""
    parameters = {p.name: p.default for p in method.specification.parameters}
    given = GLOBAL.get(method.specification.name, {})
    shared = {name: given.get(name, PER_MODEL.get(name, default)) for name, default in parameters.items()}
    return TensorContext("w", size, ROW, ROW, dtype, 0, models, shared, (shared,) * models, 1)


def best(action: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of one thread that ``action`` takes, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return min(times)


def gathered(method: Method[Any], context: TensorContext, places: tuple[Place, ...]) -> tuple[Answers, float, int]:
    """Return the answers that a method wants, the processor time that they took, and the bytes that were read."""
    with tempfile.TemporaryDirectory() as directory:
        catalog, reader = Catalog(Path(directory)), SourceReader(Ledger())
        PASSED[0] = 0
        try:
            start = time.thread_time()
            answers = StatisticsService(catalog, reader).all_answers(method, context, places)
            return answers, time.thread_time() - start, PASSED[0]
        finally:
            reader.close()
            catalog.close()


def measure(name: str, dtype_name: str, experts: int, blocks: int, repeats: int) -> Row:
    """Measure one method."""
    method, dtype = METHODS[name], DTYPES[dtype_name]
    elements = blocks * BLOCK_ELEMENTS
    raws = inputs(experts, elements, dtype)
    total = sum(raw.size for raw in raws)
    places = tuple(Held(number, raw, dtype) for number, raw in enumerate(raws))
    context = context_of(method, elements, dtype, experts + 1)
    prepare(method.kernels(), [dtype])
    with np.errstate(all="ignore"):
        runs = [gathered(method, context, places) for _ in range(1 + repeats // 3)]
        coefficients = method.coefficients(context, runs[0][0])
    size = BLOCK_ELEMENTS * dtype.itemsize

    def merge() -> None:
        for block in range(blocks):
            cut = tuple((raw[block * size : (block + 1) * size], dtype) for raw in raws)
            run_kernel(method, coefficients, cut, dtype, dtype, block * BLOCK_ELEMENTS)

    kernel = (total + raws[0].size) / best(merge, repeats) / 1e9
    needs = bool(method.statistics(context))
    return Row(
        name,
        dtype_name,
        experts,
        bool(method.kernels()),
        kernel,
        total / min(took for _, took, _ in runs) / 1e9 if needs else None,
        runs[0][2] / total if needs else None,
    )


def rows(names: tuple[str, ...], dtypes: tuple[str, ...], counts: tuple[int, ...], *how: int) -> Iterator[Row]:
    """Measure methods one after the other, with as many experts as they take."""
    for name in names:
        specification = METHODS[name].specification
        if name == "passthrough":  # which computes nothing
            continue
        most = specification.max_experts or (specification.max_models or 99) - 1
        for dtype in dtypes:
            for count in dict.fromkeys(min(count, most) for count in counts):
                yield measure(name, dtype, count, *how)


@click.command()
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="All where none is given.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=tuple(DTYPES))
@click.option("--experts", multiple=True, type=int, default=(2, 4, 8), show_default=True)
@click.option("--blocks", default=8, show_default=True, help="Blocks of 512 Ki elements in each input.")
@click.option("--repeats", default=5, show_default=True, help="The best of so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def command(
    methods: tuple[str, ...],
    dtypes: tuple[str, ...],
    experts: tuple[int, ...],
    blocks: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Measure merge methods and print what was found."""
    found = list(rows(methods or tuple(METHODS), dtypes, experts, blocks, repeats))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in found], indent=1))
        return
    table = Table("method", "dtype", "experts", "fused", "kernel GB/s", "statistics GB/s", "passes")
    for row in found:
        statistics = "" if row.statistics is None else f"{row.statistics:.2f}"
        passes = "" if row.passes is None else f"{row.passes:.1f}"
        fused = "yes" if row.fused else "no"
        table.add_row(row.method, row.dtype, str(row.experts), fused, f"{row.kernel:.2f}", statistics, passes)
    Console().print(table)


if __name__ == "__main__":
    command()
