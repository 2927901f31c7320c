"""The rooms of the package import each other in one direction only."""

import ast
from pathlib import Path

import pytest

import mergefs

PACKAGE = Path(mergefs.__file__).parent

# From the bottom to the top, as docs/architecture.md lists them; rooms in one line may not import each other.
ROOMS = (
    ("errors", "processors", "allocator", "units", "progress"),
    ("checkpoint",),
    ("kernels",),
    ("methods",),
    ("recipe",),
    ("sources",),
    ("catalog",),
    ("statistics",),
    ("planes",),
    ("tokenizer",),
    ("planner",),
    ("engine",),
    ("comparison", "materialize", "mount", "reports", "testing"),
    ("upkeep",),
    ("api",),
    ("evaluation",),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a module imports, wherever in it the import stands, but for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "mergefs" else [f"mergefs.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("mergefs."):
                found.add(name.split(".")[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_its_own_room_and_rooms_below(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVELS, f"{room} has no place in docs/architecture.md"
    for other in imported_rooms(path) - {"__version__"}:
        if other != room:
            assert LEVELS[other] < LEVELS[room], f"{path} imports mergefs.{other}, which stands above it"


def test_every_room_is_described_in_the_architecture_document() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for room in LEVELS:
        if not room.startswith("__"):
            assert f"`{room}" in text, f"docs/architecture.md does not describe {room}"
