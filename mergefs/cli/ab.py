"""``mergefs ab``."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergefs.cli.evaluation import evaluation_arguments
from mergefs.cli.settings import Settings
from mergefs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergefs.evaluation.comparison import Measured


@click.command(name="ab")
@click.argument("models", metavar="A B...", nargs=-1, required=True, type=click.Path(path_type=Path))
@evaluation_arguments
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="Complete TEXT with each model; repeatable.")
@click.option("--new-tokens", type=click.IntRange(1), default=40, show_default=True, help="Tokens of a completion.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    models: tuple[Path, ...],
    text: Path,
    running: dict[str, Any],
    opening: dict[str, Any],
    prompts: tuple[str, ...],
    new_tokens: int,
    as_json: bool,
) -> None:
    """Run two models or more on held-out text and compare them, without writing any.

    Each is a recipe, a variant of one such as merge.yml@density=0.3, the id of a plan, or a model's directory. The
    table shows the perplexity of each, and how far its next-token distributions are from those of the first.
    """
    if len(models) < 2:
        raise UsageError(f"there is nothing to compare {models[0]} with; name another recipe, plan or directory")
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.evaluation.comparison import Settings as Running
    from mergefs.evaluation.comparison import compare
    from mergefs.evaluation.loading import load_model
    from mergefs.evaluation.text import read_text

    content = read_text(text)
    loads = [partial(load_model, model, catalog=settings.catalog, **opening) for model in models]
    with progress(settings.quiet) as listener:
        results = compare(loads, content, Running(**running, prompts=prompts, new_tokens=new_tokens), listener)
    if as_json:
        print_json([asdict(result) for result in results])
        return
    _print(results, prompts)


def _print(results: "Sequence[Measured]", prompts: tuple[str, ...]) -> None:
    """Print the table, and the completions side by side."""
    from mergefs.cli.output import print_table
    from mergefs.units import format_size

    first = results[0].title
    rows = [
        (
            result.title,
            f"{result.perplexity:.4f}",
            "-" if result.divergence is None else f"{result.divergence.kl:.5f}",
            "-" if result.divergence is None else f"{result.divergence.agreement:.1%}",
            "-" if result.expert_bytes_read is None else format_size(result.expert_bytes_read),
            result.plan_id or "-",
        )
        for result in results
    ]
    columns = ("model", "perplexity", f"KL from {first}", "same next token", "experts read", "plan")
    print_table(columns, rows, numeric=(1, 2, 3, 4))
    click.echo(f"on {results[0].tokens} tokens; KL in nats for each token")
    for number, prompt in enumerate(prompts):
        completions = [(result.title, repr(result.completions[number])[1:-1]) for result in results]
        print_table((f"prompt {prompt!r}", "goes on"), completions)
