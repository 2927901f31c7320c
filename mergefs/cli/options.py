"""Options that several commands share, with one wording and one default each."""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from mergefs.cli.mergekit_options import MERGEKIT_OPTIONS, Effect, MergekitOption, Tool
from mergefs.cli.settings import Settings, absolute, start_logs
from mergefs.errors import UsageError
from mergefs.units import parse_size

if TYPE_CHECKING:
    from mergefs.planner.build import PlanOptions

DEFAULT_CACHE_SIZE: Final = "1GiB"
DEFAULT_MAX_SHARD_SIZE: Final = "5GB"

_MERGEKIT_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMB])\s*", re.IGNORECASE)
_MERGEKIT_UNITS: Final = {"K": "KB", "M": "MB", "B": "GB"}

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


class ShardSize(Size):
    """A number of bytes as mergekit writes it, where 5K, 5M and 5B are thousands, millions and billions of bytes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; a usage error when ``value`` is not a size."""
        match = None if isinstance(value, int) else _MERGEKIT_SIZE.fullmatch(value)
        return super().convert(f"{match[1]}{_MERGEKIT_UNITS[match[2].upper()]}" if match else value, param, ctx)


@dataclass(frozen=True, slots=True)
class PlanArguments:
    """What the command line says of a plan beside the recipe; cheap to make, unlike ``PlanOptions``."""

    budget: str | None
    base: str | None
    random_seed: int
    max_shard_size: int
    truncate_embeddings: bool
    copy_tokenizer: bool
    write_model_card: bool

    def options(self) -> "PlanOptions":
        """Return the same for the planner."""
        from mergefs.planner.build import PlanOptions

        return PlanOptions(
            budget=self.budget,
            base=self.base,
            random_seed=self.random_seed,
            max_shard_size=self.max_shard_size,
            truncate_embeddings=self.truncate_embeddings,
            copy_tokenizer=self.copy_tokenizer,
            write_model_card=self.write_model_card,
        )


def plan_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that plans are made with, mergekit's among them; the command gets ``arguments``, a PlanArguments.

    Options of mergekit that change nothing are told on stderr, and those that cannot be used raise UsageError.
    """

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        size, by_mergekit = values.pop("max_shard_size"), values.pop("out_shard_size")
        if by_mergekit is not None and size is not None:
            raise UsageError("--max-shard-size and --out-shard-size say the same; give one of them")
        arguments = PlanArguments(
            budget=values.pop("budget"),
            base=values.pop("base"),
            random_seed=values.pop("random_seed"),
            max_shard_size=by_mergekit or size or parse_size(DEFAULT_MAX_SHARD_SIZE),
            truncate_embeddings=values.pop("unsafe_truncate_embeddings"),
            copy_tokenizer=values.pop("copy_tokenizer"),
            write_model_card=values.pop("write_model_card"),
        )
        return function(arguments=arguments, **values)

    decorated: Callable[..., Any] = wrapper
    for decorate in (*map(_option_of_mergekit, _only_answered(Tool.YAML)), *reversed(_PLAN_OPTIONS)):
        decorated = decorate(decorated)
    return decorated


def multi_arguments(function: _Function) -> _Function:
    """Add the options that mergekit-multi has beside those of mergekit-yaml."""
    decorated: Callable[..., Any] = function
    for option in _only_answered(Tool.MULTI):
        decorated = _option_of_mergekit(option)(decorated)
    return decorated  # type: ignore[return-value]  # click's decorators keep the function


def _only_answered(tool: Tool) -> list[MergekitOption]:
    """Return the options of a tool that need no code of their own: those that are told of, or refused."""
    return [option for option in MERGEKIT_OPTIONS if option.tool is tool and option.effect is not Effect.WORKS]


def _option_of_mergekit(option: MergekitOption) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator that adds an option which changes nothing or is refused. Help does not list it."""
    how: dict[str, Any] = {"is_flag": True} if option.takes == "flag" else {}
    if option.takes in ("text", "number"):
        how["type"] = str if option.takes == "text" else int

    def answer(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is None or value in option.passed_over:
            return
        spelling = option.spelling(value)
        if option.effect is Effect.REFUSED:
            raise UsageError(f"{spelling} cannot be used: {option.explanation}")
        settings = context.obj
        if not (isinstance(settings, Settings) and settings.quiet):
            from mergefs.cli.output import print_note

            print_note(f"{spelling} changes nothing: {option.explanation}")

    return click.option(
        *option.spellings, option.name, default=None, callback=answer, expose_value=False, hidden=True, **how
    )


def _be_verbose(context: click.Context, parameter: click.Parameter, value: int) -> None:
    """Say more from here on."""
    if value and isinstance(context.obj, Settings):
        context.obj = replace(context.obj, verbose=True)
        start_logs(context.obj, context.info_name)


def _be_quiet(context: click.Context, parameter: click.Parameter, value: bool | None) -> None:
    """Say only what was asked for."""
    if value and isinstance(context.obj, Settings):
        context.obj = replace(context.obj, quiet=True)
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, when huggingface_hub is imported


def _use_cache(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Let this process, and those that it starts, look for models of the Hub there."""
    if value is not None:
        os.environ["HF_HUB_CACHE"] = str(absolute(value))


random_seed_option = click.option(
    "--random-seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of methods that drop at random.",
)

truncate_embeddings_option = click.option(
    "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
    default=False,
    help="Merge vocabularies of different sizes by the rows that all have.",
)

_PLAN_OPTIONS: Final[tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...]] = (
    click.option(
        "--budget", metavar="B", help="Bytes of experts that one full read may cost: a size (8GiB) or a share (25%)."
    ),
    click.option(
        "--base", metavar="MODEL", help="Model that stands in for what a budget leaves out, where a recipe has no base."
    ),
    random_seed_option,
    click.option(
        "--max-shard-size",
        type=Size(),
        metavar="S",
        help=f"Split the weights into files of at most this size.  [default: {DEFAULT_MAX_SHARD_SIZE}]",
    ),
    click.option("--out-shard-size", type=ShardSize(), metavar="S", hidden=True),
    truncate_embeddings_option,
    click.option(
        "--copy-tokenizer/--no-copy-tokenizer",
        default=True,
        help="Take over the tokenizer files of the base, or of the first model.  [default: yes]",
    ),
    click.option(
        "--write-model-card/--no-write-model-card",
        default=True,
        help="Add README.md and the recipe to the model.  [default: yes]",
    ),
    click.option(
        "--transformers-cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        callback=_use_cache,
        expose_value=False,
        help="Look for models of the Hugging Face Hub in DIR, and download them to it.",
    ),
    click.option(
        "-q",
        "--quiet/--no-quiet",
        default=None,
        is_eager=True,
        callback=_be_quiet,
        expose_value=False,
        help="Show no progress, no notes and no summary.",
    ),
    click.option(
        "-v", "--verbose", count=True, is_eager=True, callback=_be_verbose, expose_value=False, help="Say more."
    ),
)
"""Options that work, in the order of the help."""

MERGEKIT_EPILOG: Final = "The options of mergekit-yaml and mergekit-multi are known too: see docs/from-mergekit.md."

cache_size_option = click.option(
    "--cache-size",
    type=Size(),
    default=DEFAULT_CACHE_SIZE,
    show_default=True,
    metavar="S",
    help="Memory for blocks that may be asked for again.",
)

memory_option = click.option(
    "--memory",
    type=Size(),
    default="2GiB",
    show_default=True,
    metavar="S",
    help="Memory that the process may take, however large the models are.",
)

verify_reads_option = click.option(
    "--verify-reads/--no-verify-reads",
    default=True,
    show_default=True,
    help="Hold what is read of the models against the hashes of their analysis.",
)
