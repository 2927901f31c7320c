"""The ``mergefs`` command itself: its global options, and commands that are imported when they are called."""

import importlib
import os
from pathlib import Path

import click

from mergefs.cli.registry import COMMANDS
from mergefs.cli.settings import Settings, absolute, start_logs


class LazyGroup(click.Group):
    """A group whose commands come from the registry, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the registry's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None when there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` begin with; a usage error, with the nearest name, when there is none."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `mergefs --help` lists the commands"
            ctx.fail(f"no such command: {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the registry alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value and not ctx.resilient_parsing:
        from mergefs import __version__

        click.echo(f"mergefs {__version__}")
        ctx.exit()


@click.group(
    name="mergefs",
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--catalog",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="MERGEFS_CATALOG",
    show_envvar=True,
    metavar="DIR",
    help="The catalog to use, in place of the one in your data directory.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks of internal errors.")
@click.option(
    "--log-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a log to FILE."
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version."
)
@click.pass_context
def cli(ctx: click.Context, catalog: Path | None, verbose: bool, log_file: Path | None) -> None:
    """Merged LLM checkpoints that exist as a plan: mount them, measure them, write them when they are worth it.

    A recipe is a mergekit YAML file.
    """
    if ctx.invoked_subcommand is None or not COMMANDS[ctx.invoked_subcommand].runs_models:
        # Merging multiplies no matrices by it, and threads that wait for that take processor time from all others.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    ctx.obj = Settings(
        catalog=None if catalog is None else absolute(catalog),
        verbose=verbose,
        log_file=None if log_file is None else absolute(log_file),
    )
    start_logs(ctx.obj, ctx.invoked_subcommand)
