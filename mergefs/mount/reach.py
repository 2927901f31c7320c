"""Whether a recipe that is read while a mount lasts would have the mount read from itself."""

import os
from pathlib import Path
from typing import Final

from mergefs.errors import MountError
from mergefs.recipe.definition import Recipe

_LONGEST_CHAIN: Final = 40
"""Symbolic links that are followed one after the other, as Linux does it."""


def refuse_models_inside(mountpoint: Path, recipe: Recipe) -> None:
    """Refuse a recipe that would have a mount read from itself, which would wait for itself forever.

    Nothing at ``mountpoint`` or below it is looked at. Raises MountError.
    """
    models = (*(entry.model for entry in recipe.inputs()), *recipe.bases)
    for reference in (*models, *(model.adapter for model in models if model.adapter is not None)):
        for directory in recipe.directories:
            path = directory / Path(os.path.expanduser(reference.path))  # noqa: PTH111 - raises for unknown users
            if _leads_into(path, mountpoint):
                raise MountError(
                    f"{recipe.origin}: the model {path} lies inside the mount point {mountpoint} that would show the "
                    "merge; name a model outside of it"
                )


def _leads_into(path: Path, mountpoint: Path) -> bool:
    """Return whether following ``path`` comes to ``mountpoint``, without a step into that."""
    for _ in range(_LONGEST_CHAIN):
        path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would look at what lies inside
        step = Path("/")
        for part in path.parts[1:]:
            step /= part
            if step == mountpoint:
                return True
            if step.is_symlink():
                path = step.parent / step.readlink() / path.relative_to(step)
                break
        else:
            return False
    return False
