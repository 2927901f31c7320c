"""``mergefs catalog``."""

import click

from mergefs.cli.catalog_check import command as check
from mergefs.cli.catalog_gc import command as gc
from mergefs.cli.settings import Settings


@click.group(name="catalog")
def command() -> None:
    """Look into the catalog: the statistics, plans and transactions that mergefs keeps."""


@command.command(name="info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def info(settings: Settings, as_json: bool) -> None:
    """Show where the catalog is, how large, and what it holds."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_pairs, print_table
    from mergefs.units import format_size

    with Catalog(settings.catalog or default_location()) as catalog:
        counts = catalog.counts()
        size = catalog.size_on_disk()
        space = catalog.space()
        models = catalog.checkpoints()
        path = catalog.path
    if as_json:
        print_json(
            {
                "path": str(path),
                "size_bytes": size,
                "records": counts,
                "bytes": space,
                "models": [
                    {"path": m.path, "tensors": m.tensors, "total_bytes": m.total_bytes, "content": m.content}
                    for m in models
                ],
            }
        )
        return
    print_pairs({"catalog": str(path), "size": format_size(size)})
    kinds = dict.fromkeys((*counts, *(kind for kind, taken in space.items() if taken)))
    tables = [(kind, str(counts.get(kind, "")), format_size(space[kind])) for kind in kinds]
    print_table(("table", "records", "size"), tables, numeric=(1, 2))
    if models:
        rows = [(m.path, str(m.tensors), format_size(m.total_bytes), m.content or "not analysed") for m in models]
        print_table(("model", "tensors", "size", "identity"), rows, numeric=(1, 2))


command.add_command(check)
command.add_command(gc)
