"""The sub-commands of ``scripts/bench.py``."""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bench.processes import ROOT, environment, scratch
from bench.shapes import LLAMA_70B
from bench.startup import Measurement, measure_startup


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
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where models, outputs and measurements are kept; the next run goes on with what is there.",
)
@click.option("--size", default="1GiB", show_default=True, help="Bytes of each model, at least.")
@click.option("--small-size", default="150MB", show_default=True, help="Bytes of each model where all are compared.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of each row.")
@click.option(
    "--patience",
    type=float,
    default=240.0,
    show_default=True,
    help="Seconds after which a way is not measured again in a row, however few its rounds are.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of mergekit.  [default: one for each core]")
@click.option("--rows", default="", help="Only rows whose names match: ties*,linear-k4@1GiB.")
@click.option(
    "--list", "only_list", is_flag=True, help="List the rows in the order of measuring, and whether they are done."
)
@click.option("--smoke", is_flag=True, help="Everything once, with few experts: to see that all of it runs.")
@click.option(
    "--document",
    type=click.Path(path_type=Path, dir_okay=False),
    default=ROOT / "docs" / "benchmarks.md",
    help="The page whose measured part is written anew; its figures lie beside it in figures/.",
)
def compare(
    work: Path,
    size: str,
    small_size: str,
    repeat: int,
    patience: float,
    threads: int | None,
    rows: str,
    only_list: bool,
    smoke: bool,
    document: Path,
) -> None:
    """Compare mergefs with mergekit, plain copying and itself, and write docs/benchmarks.md.

    Rows are measured in order of their importance, and every measurement is kept at once: stop it at any time, and run
    it again to go on. Ends with status 1 where outputs differ that must not.
    """
    from bench.comparison import Order, run_comparison
    from bench.setting import SMOKE, Extent, Setting
    from mergefs.units import parse_size

    setting = Setting(
        work.resolve(),
        parse_size(size),
        parse_size(small_size),
        threads or len(os.sched_getaffinity(0)),
        SMOKE if smoke else Extent(),
    )
    order = Order(repeat, patience, rows, only_list)
    sys.exit(0 if run_comparison(setting, order, document, lambda line: click.echo(line, err=True)) else 1)


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


@bench.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where to make the sparse models and their catalog (2.4 GB for 16 experts), kept for the next run.",
)
@click.option("--experts", type=click.IntRange(min=1), default=16, show_default=True, help="Experts beside the base.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option("--memory", help="What planning may use, given to mergefs plan --memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def scale(work: Path, experts: int, repeat: int, memory: str | None, as_json: bool) -> None:
    """What planning and mounting take with models of 405 B parameters, which have made-up statistics.

    The largest value of all rounds is held against its target.
    """
    from bench.scale import Family, measure_scale
    from bench.shapes import LLAMA_405B

    family = Family(work.resolve(), LLAMA_405B, experts)
    figures = measure_scale(family, repeat, () if memory is None else ("--memory", memory))
    if as_json:
        click.echo(json.dumps({figure.name: figure.values for figure in figures}, indent=2))
        return
    click.echo(f"{experts} experts of {LLAMA_405B.parameters / 1e9:.1f} B parameters, {repeat} rounds")
    for figure in figures:
        verdict = ""
        if figure.target is not None:
            met = "met" if figure.worst < figure.target else "MISSED"
            verdict = f"  (to stay below {figure.shown(figure.target)}: {met})"
        click.echo(f"{figure.name}: {', '.join(map(figure.shown, figure.values))}{verdict}")


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


@bench.command()
@click.option("--size", default="1GiB", show_default=True, help="Bytes of each of the three models, at least.")
@click.option("--others", type=click.IntRange(min=0), default=10, show_default=True, help="Recipes beside the edited.")
@click.option("--repeat", type=click.IntRange(min=1), default=15, show_default=True, help="Rounds that are counted.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to write the models; a temporary directory otherwise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def switch(size: str, others: int, repeat: int, directory: Path | None, as_json: bool) -> None:
    """What editing a mounted recipe takes until its first tensor is read, beyond the time of reading that.

    And how soon recipes that are added, broken and removed show.
    """
    from bench.switching import measure_switching
    from mergefs.units import parse_size

    with scratch(directory) as place:
        parameters, measurements = measure_switching(place, parse_size(size), others, repeat)
    facts = {"parameters_of_each_model": parameters, "recipes_beside": others, "rounds": repeat}
    report(measurements, facts, as_json)
