"""The table of commands. Listing them imports none of them."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives, and its one line in ``mergefs --help``; ``runs_models`` with torch, or only merges."""

    module: str
    attribute: str
    summary: str
    runs_models: bool = False


# In the order of ``mergefs --help``.
COMMANDS: Final[dict[str, Entry]] = {
    "mount": Entry("mergefs.cli.mount", "command", "Show merged models as a directory, without writing them."),
    "umount": Entry("mergefs.cli.umount", "command", "Take a mount away."),
    "status": Entry("mergefs.cli.status", "command", "Show the mounts, and what they have read and served."),
    "analyze": Entry("mergefs.cli.analyze", "command", "Gather the statistics that budgets choose by."),
    "plan": Entry("mergefs.cli.plan", "command", "Show what a recipe reads and what it costs."),
    "explain": Entry("mergefs.cli.explain", "command", "Show where the bytes of a budget go, and what is left out."),
    "diff": Entry("mergefs.cli.diff", "command", "Show how far two models are from each other, tensor by tensor."),
    "ab": Entry(
        "mergefs.cli.ab", "command", "Compare merged models on held-out text, without writing any.", runs_models=True
    ),
    "sweep": Entry(
        "mergefs.cli.sweep", "command", "Measure a grid of a recipe's variants on held-out text.", runs_models=True
    ),
    "materialize": Entry("mergefs.cli.materialize", "command", "Write a merged model to disk, all or nothing."),
    "verify": Entry("mergefs.cli.verify", "command", "Check a materialized model against its manifest."),
    "log": Entry("mergefs.cli.log", "command", "Show what a model was made of."),
    "methods": Entry("mergefs.cli.methods", "command", "List the merge methods, or explain one."),
    "catalog": Entry("mergefs.cli.catalog", "command", "Look into the catalog."),
    "demo": Entry(
        "mergefs.cli.demo", "command", "Train a small family, merge it, mount it, and measure it.", runs_models=True
    ),
}
