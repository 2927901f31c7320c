"""Which recipe files are meant by paths on the command line, and what their models are called."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergefs.errors import RecipeError


def expand_recipes(recipes: Sequence[Path]) -> tuple[Path, ...]:
    """Return the recipe files that are meant: those named, and those in the directories that are named.

    Raises RecipeError for a directory that has none or cannot be read.
    """
    files: list[Path] = []
    for path in recipes:
        try:
            found = recipes_at(path)
        except OSError as error:
            raise RecipeError(
                f"{path}: cannot be read ({error.strerror}); give a mergekit YAML file, or a directory of them"
            ) from None
        if not found:
            raise RecipeError(f"{path}: has no recipe; put mergekit configs ending in .yml or .yaml there")
        files += found
    return tuple(files)


def recipes_at(path: Path) -> tuple[Path, ...]:
    """Return the recipes in the directory ``path``, or ``path`` itself where it is none; OSError when that fails.

    Hidden files are none: editors keep what is unfinished in such.
    """
    if not path.is_dir():
        return (path,)
    entries = sorted(entry for entry in path.iterdir() if entry.suffix in (".yml", ".yaml"))
    return tuple(entry for entry in entries if entry.is_file() and not entry.name.startswith("."))


def unique_names(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return the name of each recipe's directory: the file's name without its suffix, with the changes of a variant.

    Where two recipes would share a name, or what is left begins with a dot, the suffix stays; after that a number is
    added.
    """
    names: list[str] = []
    for path in paths:
        short = _short_name(path)
        name = path.name if short in names or short.startswith(".") else short
        number = 2
        while name in names:
            name = f"{short}-{number}"
            number += 1
        names.append(name)
    return tuple(names)


def _short_name(path: Path) -> str:
    """Return what a mount calls the model of a recipe, or of a variant of it, unless that is taken."""
    file, separator, changes = path.name.partition("@")
    return f"{Path(file).stem}@{changes}" if separator and not path.exists() else path.stem
