"""``mergefs methods``."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergefs.methods.contract import Parameter, Specification


@click.command(name="methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain the one called NAME: its parameters, defaults and what it needs."""
    from mergefs.cli.output import print_json, print_table
    from mergefs.errors import UsageError
    from mergefs.methods.registry import METHODS, specification

    if name is None:
        found = [method.specification for method in METHODS.values()]
        if as_json:
            print_json([_described(one) for one in found])
        else:
            print_table(("method", "what it does"), [(one.name, one.summary) for one in found])
        return
    one = specification(name)
    if one is None:
        raise UsageError(f"there is no merge method {name!r}; `mergefs methods` lists those that there are")
    if as_json:
        print_json(_described(one))
    else:
        _explain(one)


def _described(one: "Specification") -> dict[str, object]:
    """Return a specification for programs."""
    return {
        "name": one.name,
        "title": one.title,
        "summary": one.summary,
        "reference": one.reference,
        "base_model": one.base.value,
        "min_models": one.min_models,
        "max_models": one.max_models,
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
            for parameter in one.parameters
        ],
    }


def _explain(one: "Specification") -> None:
    """Print a specification for people."""
    from mergefs.cli.output import print_pairs, print_table

    click.echo(f"{one.title}: {one.summary}\n")
    models = f"at least {one.min_models}" if one.max_models is None else f"{one.min_models} to {one.max_models}"
    models = str(one.min_models) if one.min_models == one.max_models else models
    print_pairs({"base_model": one.base.value, "models": f"{models}, the base among them", "source": one.reference})
    if one.parameters:
        rows = [(p.name, p.scope.value, _default(p), _range(p), p.meaning) for p in one.parameters]
        print_table(("parameter", "scope", "default", "range", "meaning"), rows)


def _default(parameter: "Parameter") -> str:
    """Return the default as a recipe writes it."""
    if parameter.required:
        return "required"
    return "none" if parameter.default is None else str(parameter.default).lower()


def _range(parameter: "Parameter") -> str:
    """Return which values are taken."""
    if parameter.kind == "bool":
        return "true, false"
    bounds = (parameter.minimum, parameter.maximum)
    low, high = ("" if bound is None else f"{bound:g}" for bound in bounds)
    return f"{low} to {high}" if low and high else f"from {low}" if low else f"up to {high}" if high else "any"
