#!/usr/bin/env python3
"""Benchmarks of mergefs: each command measures one promise, prints a table, and with --json the same for programs.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/bench.py startup``.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that one thing took, several times, and the median that it should stay below (None: no target)."""

    name: str
    seconds: tuple[float, ...]
    target: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def meets_target(self) -> bool | None:
        return None if self.target is None else self.median < self.target


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the tensors of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in the order of a checkpoint."""
        key_value = self.hidden // self.heads * self.key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.k_proj.weight": (key_value, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (key_value, self.hidden),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def config(self) -> dict[str, Any]:
        """Return the ``config.json`` of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


LLAMA_70B: Final = Shape(hidden=8192, intermediate=28672, layers=80, heads=64, key_value_heads=8, vocabulary=128256)


def write_sparse_model(directory: Path, shape: Shape, shard_size: int = 5 * 10**9) -> int:
    """Write a sharded bf16 model whose data are holes, and return its number of parameters."""
    from mergefs.checkpoint.dtypes import BF16
    from mergefs.checkpoint.header import encode_header

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for name, dimensions in shape.tensors().items():
        size = 2
        for dimension in dimensions:
            size *= dimension
        if shards[-1] and sum(entry[2] for entry in shards[-1]) + size > shard_size:
            shards.append([])
        shards[-1].append((name, dimensions, size))
    weight_map: dict[str, str] = {}
    total = 0
    for number, members in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = encode_header([(name, BF16, dimensions) for name, dimensions, _ in members], {"format": "pt"})
        size = sum(entry[2] for entry in members)
        with (directory / file_name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        weight_map |= {name: file_name for name, _, _ in members}
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total // 2


def write_sparse_family(directory: Path, shape: Shape, experts: int) -> tuple[Path, int]:
    """Write a base and its experts as sparse files; return a ties recipe for them and the parameters of each."""
    names = ["base", *(f"expert-{number}" for number in range(1, experts + 1))]
    parameters = [write_sparse_model(directory / name, shape) for name in names]
    recipe = {
        "merge_method": "ties",
        "base_model": str(directory / "base"),
        "models": [
            {"model": str(directory / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in names[1:]
        ],
        "dtype": "bfloat16",
    }
    path = directory / "ties.yml"
    path.write_text(json.dumps(recipe, indent=2))
    return path, parameters[0]


def timed(arguments: Sequence[str | Path], environment: dict[str, str]) -> float:
    """Run a command, which must succeed, and return how many seconds it took."""
    started = time.perf_counter()
    result = subprocess.run(
        list(map(str, arguments)),
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - started
    if result.returncode != 0:
        raise click.ClickException(f"{' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return elapsed


def environment(directory: Path) -> dict[str, str]:
    """Return an environment in which mergefs is importable and keeps everything below ``directory``."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "MERGEFS_CATALOG": str(directory / "catalog"),
        "XDG_STATE_HOME": str(directory / "state"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
    }


@contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """Lend a directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="mergefs-bench-", dir=where))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def measure_startup(directory: Path, shape: Shape, experts: int, repeat: int) -> tuple[int, list[Measurement]]:
    """Measure how soon a mount answers, and ``mergefs --help``; return the parameters of each model too.

    The commands take turns, so that what else the machine does meets all of them alike. The first round, which compiles
    byte code and fills the page cache, is not counted.
    """
    recipe, parameters = write_sparse_family(directory, shape, experts)
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    variables = environment(directory)
    mergefs = [sys.executable, "-m", "mergefs"]

    def mount(*options: str) -> float:
        elapsed = timed([*mergefs, "mount", *options, recipe, mountpoint], variables)
        timed([*mergefs, "umount", mountpoint], variables)
        return elapsed

    def mount_with_new_catalog() -> float:
        shutil.rmtree(directory / "catalog", ignore_errors=True)
        return mount()

    steps: dict[str, tuple[Callable[[], float], float | None]] = {
        "python -c pass": (lambda: timed([sys.executable, "-c", "pass"], variables), None),
        "mergefs --help": (lambda: timed([*mergefs, "--help"], variables), 0.3),
        "mergefs mount, first time": (mount_with_new_catalog, 2.0),
        "mergefs mount, plan known": (mount, 2.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, (step, _) in steps.items():
            elapsed = step()
            if turn:
                seconds[name].append(elapsed)
    return parameters, [Measurement(name, tuple(seconds[name]), target) for name, (_, target) in steps.items()]


def report(measurements: Sequence[Measurement], facts: dict[str, Any], as_json: bool) -> None:
    """Print measurements as a table or as JSON."""
    if as_json:
        rows = [asdict(m) | {"median": m.median, "meets_target": m.meets_target} for m in measurements]
        click.echo(json.dumps(facts | {"measurements": rows}, indent=2))
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")
    width = max(len(m.name) for m in measurements)
    click.echo(f"{'':<{width}}  {'median s':>8}  {'fastest':>8}  {'slowest':>8}  target")
    for m in measurements:
        verdict = "" if m.target is None else f"< {m.target:g} s: {'met' if m.meets_target else 'MISSED'}"
        row = f"{m.name:<{width}}  {m.median:8.3f}  {min(m.seconds):8.3f}  {max(m.seconds):8.3f}  {verdict}"
        click.echo(row.rstrip())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Benchmarks of mergefs."""


@bench.command()
@click.option("--experts", type=click.IntRange(min=1), default=4, show_default=True, help="Experts beside the base.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds that are counted.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to make the sparse models, on a file system that has sparse files; a temporary one otherwise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def startup(experts: int, repeat: int, directory: Path | None, as_json: bool) -> None:
    """How long until a mount of 70 B parameter models answers, and until --help is printed."""
    with scratch(directory) as place:
        parameters, measurements = measure_startup(place, LLAMA_70B, experts, repeat)
    facts = {"parameters_of_each_model": parameters, "experts": experts, "rounds": repeat}
    report(measurements, facts, as_json)


@bench.command(name="materialize-cost")
@click.option("--size", default="1GiB", show_default=True, help="Bytes of each of the three models, and of the output.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds that are counted.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to write the models, four of them at a time; a temporary directory otherwise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def materialize_cost(size: str, repeat: int, directory: Path | None, as_json: bool) -> None:
    """What hashing, fsync and checked reads cost materialize, against cp and sync of as many bytes.

    Planning is not counted, and the inputs have been hashed by an earlier run.
    """
    from materialize_cost import measure

    from mergefs.units import parse_size

    with scratch(directory) as place:
        seconds = measure(place, parse_size(size), repeat, environment(place))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report(
        [Measurement(name, tuple(times), None) for name, times in seconds.items()],
        {
            "size": size,
            "rounds": repeat,
            "materialize_to_cp_and_sync": round(medians["materialize"] / medians["cp and sync"], 2),
            "materialize_to_nothing_checked": round(medians["materialize"] / medians["without all of these"], 2),
        },
        as_json,
    )


if __name__ == "__main__":
    bench()
