"""The options of commands that run models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

_OPTIONS: Final = (
    click.option(
        "--text", metavar="FILE", required=True, type=click.Path(path_type=Path), help="Held-out text to measure on."
    ),
    click.option("--context", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a window."),
    click.option(
        "--limit-tokens", type=click.IntRange(1), default=16384, show_default=True, help="Most tokens to measure on."
    ),
    click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows to run at once."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where to run: auto (a GPU where there is one), cpu, cuda:1.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(("float32", "bfloat16", "float16")),
        default="float32",
        show_default=True,
        help="Dtype to run in.",
    ),
    click.option("--budget", metavar="B", help="Bytes of experts that each merge may cost, such as 25% or 8GiB."),
    click.option("--base", metavar="MODEL", help="Model that stands in for what a budget does not buy."),
    click.option("--random-seed", type=int, default=0, show_default=True, help="Seed of random methods."),
)


def evaluation_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets ``text``, ``running`` (how models are run), and ``opening`` of mergefs.open."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        running = {
            "context": values.pop("context"),
            "tokens": values.pop("limit_tokens"),
            "batch": values.pop("batch"),
        }
        opening = {name: values.pop(name) for name in ("budget", "base", "random_seed", "device", "dtype")}
        return function(running=running, opening=opening, **values)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
