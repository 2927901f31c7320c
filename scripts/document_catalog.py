"""Writes docs/catalog.md from what the catalog's schema and the invariants of its check say of themselves.

usage: scripts/document_catalog.py [--check]     (--check only says, by the exit status, whether the page is up to date)
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mergefs.catalog.catalog import FORMAT
from mergefs.catalog.check.files import FILE_INVARIANTS
from mergefs.catalog.check.records import INVARIANTS
from mergefs.catalog.check.values import VALUE_INVARIANTS
from mergefs.catalog.schema import SCHEMA, Table

PAGE = Path(__file__).parent.parent / "docs" / "catalog.md"
BEGIN = "<!-- made by scripts/document_catalog.py -->\n"
END = "<!-- end -->\n"


def description() -> str:
    """Return the part of the page that follows from the code, in Markdown."""
    lines = [f"The format is {FORMAT}.", "", "### The catalog as a whole", ""]
    lines += _invariants({one.number: one.states for one in FILE_INVARIANTS})
    lines += ["", "### Every record of every table", ""]
    lines += _invariants({one.number: one.states for one in VALUE_INVARIANTS})
    for name, table in SCHEMA.items():
        lines += ["", *_table(name, table)]
    return "\n".join(lines) + "\n"


def _table(name: str, table: Table) -> Iterator[str]:
    """Yield what is to be said of one table."""
    yield f"### `{name}`: {table.holds}"
    yield ""
    yield f"Key: {table.key}."
    yield ""
    yield "| field | type | |"
    yield "|---|---|---|"
    kinds = table.record.__annotations__
    for field, meaning in table.fields.items():
        kind = kinds[field]
        text = kind.__name__ if isinstance(kind, type) else str(kind).replace("mergefs.catalog.records.", "")
        escaped = text.replace("|", "\\|")
        yield f"| `{field}` | `{escaped}` | {meaning} |"
    yield ""
    again = "Nothing else knows it." if table.again is None else f"When a record is lost, {table.again}."
    yield again
    own = {one.number: one.states for one in INVARIANTS if one.table == name}
    if own:
        yield ""
        yield from _invariants(own)


def _invariants(states: Mapping[str, str]) -> list[str]:
    return [f"* **{number}** {text}" for number, text in states.items()]


def updated(page: str) -> str:
    """Return the page with the description of now."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has no place for the description: {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{begin}\n{description()}\n{end}{after}"


def main() -> int:
    """Write the page, or with ``--check`` compare it."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = updated(page)
    if "--check" in sys.argv[1:]:
        if page != wanted:
            print(f"{PAGE} is not up to date; run scripts/document_catalog.py", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
