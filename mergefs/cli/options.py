"""Options that several commands share, with one wording and one default each."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from mergefs.units import parse_size

DEFAULT_CACHE_SIZE: Final = "1GiB"
DEFAULT_MAX_SHARD_SIZE: Final = "5GB"

_Function = TypeVar("_Function", bound=Callable[..., Any])


if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
else:
    _SizeType = click.ParamType  # generic since click 8.3 only


class Size(_SizeType):
    """A positive number of bytes, written as people write it; the command gets an int."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; a usage error when ``value`` is not a size."""
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size <= 0:
            self.fail(f"{value!r} is not more than nothing", param, ctx)
        return size


def recipe_options(function: _Function) -> _Function:
    """Add the options that change what a recipe means: ``budget``, ``base``, ``random_seed``."""
    for decorate in (
        click.option(
            "--random-seed",
            type=int,
            default=0,
            show_default=True,
            metavar="N",
            help="Seed of methods that drop at random.",
        ),
        click.option(
            "--base",
            metavar="MODEL",
            help="Model that stands in for what a budget leaves out, where a recipe has no base.",
        ),
        click.option(
            "--budget",
            metavar="B",
            help="Bytes of experts that one full read may cost: a size (8GiB) or a share (25%).",
        ),
    ):
        function = decorate(function)
    return function


max_shard_size_option = click.option(
    "--max-shard-size",
    type=Size(),
    default=DEFAULT_MAX_SHARD_SIZE,
    show_default=True,
    metavar="S",
    help="Split the weights into files of at most this size.",
)

cache_size_option = click.option(
    "--cache-size",
    type=Size(),
    default=DEFAULT_CACHE_SIZE,
    show_default=True,
    metavar="S",
    help="Memory for blocks that may be asked for again.",
)
