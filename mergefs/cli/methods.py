"""``mergefs methods``."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergefs.methods.contract import Specification
    from mergefs.methods.registry import RegisteredMethod

_OURS = "mergefs"


@click.command(name="methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain the one called NAME: its parameters, what it needs, and its smallest recipe.

    Methods that other installed packages register are among them.
    """
    if name is None:
        _list(as_json)
    else:
        _explain(name, as_json)


def _list(as_json: bool) -> None:
    """Print all methods; what cannot be used is told on stderr."""
    from mergefs.cli.output import print_json, print_note, print_table
    from mergefs.methods.registry import registered_methods

    usable, problems = registered_methods()
    if as_json:
        print_json([_described(one) for one in usable])
    elif any(one.origin for one in usable):
        rows = [(one.specification.name, str(one.origin or _OURS), one.specification.summary) for one in usable]
        print_table(("method", "from", "what it does"), rows)
    else:
        print_table(("method", "what it does"), [(one.specification.name, one.specification.summary) for one in usable])
    for problem in problems:
        print_note(str(problem))


def _explain(name: str, as_json: bool) -> None:
    """Print what a method declares. Raises UsageError when there is none of that name."""
    from mergefs.cli.output import print_json
    from mergefs.errors import UsageError
    from mergefs.methods.registry import find_method, method_names
    from mergefs.recipe.wording import nearest

    one = find_method(name)
    if one is None:
        near = nearest(name, method_names())
        hint = f"did you mean {near!r}?" if near else "`mergefs methods` lists those that there are"
        raise UsageError(f"there is no merge method {name!r}; {hint}")
    if as_json:
        print_json(_described(one))
    else:
        _print(one)


def _described(one: "RegisteredMethod") -> dict[str, object]:
    """Return a method for programs."""
    from mergefs.methods.explanation import example_recipe

    specification = one.specification
    return {
        "name": specification.name,
        "title": specification.title,
        "summary": specification.summary,
        "reference": specification.reference,
        "package": None if one.origin is None else one.origin.distribution,
        "package_version": None if one.origin is None else one.origin.version,
        "base_model": specification.base.value,
        "min_models": specification.min_models,
        "max_models": specification.max_models,
        "min_experts": specification.min_experts,
        "max_experts": specification.max_experts,
        "few_models": specification.few_models.value,
        "needs": specification.needs,
        "parameters": [
            {
                "name": parameter.name,
                "kind": parameter.kind,
                "scope": parameter.scope.value,
                "required": parameter.required,
                "default": parameter.default,
                "minimum": parameter.minimum,
                "maximum": parameter.maximum,
                "meaning": parameter.meaning,
            }
            for parameter in specification.parameters
        ],
        "example": example_recipe(specification),
    }


def _print(one: "RegisteredMethod") -> None:
    """Print a method for people."""
    from mergefs.cli.output import print_pairs
    from mergefs.methods.explanation import example_recipe, missing_in_words, models_in_words, needs_in_words

    specification = one.specification
    click.echo(f"{specification.title}: {specification.summary}\n")
    print_pairs(
        {
            "base_model": specification.base.value,
            "models": models_in_words(specification),
            "missing tensors": missing_in_words(specification),
            "needs to know": needs_in_words(specification),
            "described at": specification.reference,
            "from": str(one.origin or _OURS),
        }
    )
    _print_parameters(specification)
    click.echo("\nThe smallest recipe:\n")
    click.echo("".join(f"    {line}\n" for line in example_recipe(specification).splitlines()), nl=False)


def _print_parameters(specification: "Specification") -> None:
    """Print the table of parameters, where there are any."""
    from mergefs.cli.output import print_table
    from mergefs.methods.explanation import default_in_words, range_in_words

    if not specification.parameters:
        click.echo("\nIt has no parameters.")
        return
    rows = [
        (one.name, one.scope.value, default_in_words(one), range_in_words(one), one.meaning)
        for one in specification.parameters
    ]
    print_table(("parameter", "scope", "default", "range", "meaning"), rows)
