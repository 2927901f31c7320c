#!/usr/bin/env python3
"""Measures how fast ``mergefs.load_state_dict`` brings a merge to a device, with more and more processors.

Each load is a process of its own, kept to some of the processors; what was read before is in the page cache. Every
state dict must be the same bits, whatever the device and the number of processors, or there is no table.

Run it with the Python of an environment that mergefs is installed in: ``python scripts/measure_loading.py --work DIR``.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from bench.families import make_family
from bench.recipes import METHODS, write_recipe
from rich.console import Console
from rich.table import Table

from mergefs.units import parse_size

_LOADS: Final = 2
"""Of each process; the first one also takes what torch and the device need once, and the last is told."""


@dataclass(frozen=True, slots=True)
class Load:
    """One load: seconds, bytes of the merged model, and a hash of all of it."""

    method: str
    device: str
    processors: int
    seconds: float
    size: int
    digest: str


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where models are made and kept.")
@click.option("--size", default="1GiB", show_default=True, help="Bytes of each model.")
@click.option("--experts", default=4, show_default=True)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=("linear", "ties"))
@click.option("--devices", default="cpu", show_default=True, help="Such as cpu,cuda.")
@click.option("--processors", default="1,2", show_default=True, help="Numbers of processors to be kept to.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_context
def main(
    context: click.Context,
    work: Path,
    size: str,
    experts: int,
    methods: tuple[str, ...],
    devices: str,
    processors: str,
    as_json: bool,
) -> None:
    """Make a family, load merges of it, and print how long that took."""
    if context.invoked_subcommand is not None:
        return
    family = make_family(work / "families", parse_size(size), experts)
    found: list[Load] = []
    for method in methods:
        recipe = write_recipe(work / "recipes", method, family)
        for device in devices.split(","):
            found += [_in_a_process(work, recipe, method, device, int(count)) for count in processors.split(",")]
        if len({load.digest for load in found if load.method == method}) != 1:
            raise click.ClickException(f"{method}: loads differ that must not")
    if as_json:
        click.echo(json.dumps([asdict(load) for load in found], indent=2))
        return
    table = Table("method", "device", "processors", "seconds", "GB/s", title="the same bits each time")
    for load in found:
        rate = f"{load.size / load.seconds / 1e9:.2f}"
        table.add_row(load.method, load.device, str(load.processors), f"{load.seconds:.2f}", rate)
    Console().print(table)


def _in_a_process(work: Path, recipe: Path, method: str, device: str, processors: int) -> Load:
    """Load in a new process that is kept to some processors."""
    command = [sys.executable, __file__, "--work", str(work), "load", str(recipe), method, device, str(processors)]
    kept = sorted(os.sched_getaffinity(0))[:processors]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, kept)
    )
    load = Load(**json.loads(done.stdout))
    click.echo(f"{method} to {device} with {processors} processors: {load.seconds:.2f} s", err=True)
    return load


@main.command("load", hidden=True)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("method")
@click.argument("device")
@click.argument("processors", type=int)
@click.pass_context
def load(context: click.Context, recipe: Path, method: str, device: str, processors: int) -> None:
    """Load a merge and say what that took."""
    import torch

    import mergefs

    assert context.parent is not None
    work: Path = context.parent.params["work"]
    seconds = 0.0
    for _ in range(_LOADS):
        started = time.perf_counter()
        state = mergefs.load_state_dict(recipe, device=device, catalog=work / "catalog")
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    hasher = hashlib.sha256()
    for name in sorted(state):
        hasher.update(name.encode() + state[name].cpu().contiguous().view(torch.uint8).numpy().data)
    size = sum(tensor.nbytes for tensor in state.values())
    click.echo(json.dumps(asdict(Load(method, device, processors, seconds, size, hasher.hexdigest()))))


if __name__ == "__main__":
    main()
