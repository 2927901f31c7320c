"""Writes the table of mergekit's options into docs/from-mergekit.md, from where the command line has them.

usage: scripts/document_options.py [--check]     (--check only says, by the exit status, whether the page is up to date)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mergefs.cli.mergekit_options import MERGEKIT_OPTIONS, MergekitOption, Tool

PAGE = Path(__file__).parent.parent / "docs" / "from-mergekit.md"
BEGIN = "<!-- made by scripts/document_options.py -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """Return the table in Markdown, the options of both commands in mergekit's order."""
    lines = ["| option | here | |", "|---|---|---|"]
    for tool in Tool:
        rows = [option for option in MERGEKIT_OPTIONS if option.tool is tool]
        if tool is Tool.MULTI:
            lines.append(f"| **`{tool.value}` alone** | | |")
        lines += [f"| {spelled(option)} | {effect(option)} | {option.explanation} |" for option in rows]
    return "\n".join(lines) + "\n"


def spelled(option: MergekitOption) -> str:
    """Return the ways to write an option, but for a side of a switch that asks for what is done anyway."""
    if option.takes == "switch" and option.passed_over:
        return f"`{option.spelling(not option.passed_over[0])}`"
    return ", ".join(f"`{way}`" for spelling in option.spellings for way in spelling.split("/"))


def effect(option: MergekitOption) -> str:
    """Return what an option does, and for which values that is not so."""
    silent = [f"`{value}`" for value in option.passed_over if isinstance(value, str)]
    return option.effect.value + (f", but for {' and '.join(silent)}" if silent else "")


def updated(page: str) -> str:
    """Return the page with the table of now."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has no place for the table: {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


def main() -> int:
    """Write the page, or with ``--check`` compare it."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = updated(page)
    if "--check" in sys.argv[1:]:
        if page != wanted:
            print(f"{PAGE} is not up to date; run scripts/document_options.py", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
