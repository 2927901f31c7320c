"""``python -m mergefs.catalog.check PATH [--repair] [--forget] [--salvage]``: what ``supervision`` starts.

Writes the report as msgpack to stdout. Exit status ``REFUSED``: a sentence on stderr, why the catalog cannot be
opened. ``DAMAGED``: the same, and it is its data that is to blame.
"""

import sys
from pathlib import Path

import lmdb
import msgspec

from mergefs.catalog.check.run import check
from mergefs.catalog.check.salvage import salvage
from mergefs.catalog.check.supervision import DAMAGED, REFUSED
from mergefs.errors import CatalogError


def main() -> int:
    """Check, or salvage."""
    path, options = Path(sys.argv[1]), sys.argv[2:]
    try:
        if "--salvage" in options:
            salvage(path)
        else:
            sys.stdout.buffer.write(msgspec.msgpack.encode(check(path, "--repair" in options, "--forget" in options)))
    except CatalogError as error:
        sys.stderr.write(str(error))
        return DAMAGED if isinstance(error.__cause__, lmdb.Error) else REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
