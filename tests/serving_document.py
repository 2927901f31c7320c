"""The blocks of docs/serving.md, and their paths moved below a directory of a test."""

import re
from pathlib import Path
from typing import Final

DOCUMENT: Final = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: Final[list[tuple[str, str]]] = _BLOCK.findall(DOCUMENT)


def blocks(language: str) -> list[str]:
    found = [text for kind, text in BLOCKS if kind == language]
    assert found
    return found


def moved(text: str, directory: Path) -> str:
    """Return ``text`` with directories of ``directory`` in place of the system's."""
    text = text.replace("/usr/local/bin", f"{directory}/bin")
    return re.sub(r"(?<![\w.])/(mnt|srv)\b", rf"{directory}/\1", text)
