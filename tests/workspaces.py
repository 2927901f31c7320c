"""What plans are made and written with, on the catalog of the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Lend one, and close it."""
    resources = Workspace.create(Catalog(Path(os.environ["MERGEFS_CATALOG"])))
    try:
        yield resources
    finally:
        resources.close()
