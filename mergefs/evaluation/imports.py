"""Libraries that merging does without, imported where models are run: offline, quiet, or with a clear error."""

import importlib
import os
from typing import Any

from mergefs.errors import MissingDependencyError


def import_transformers() -> Any:
    """Return the transformers module, kept off the network and without warnings or progress bars of its own.

    Raises MissingDependencyError when it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise missing_dependency("transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def missing_dependency(library: str) -> MissingDependencyError:
    """Return the error that says how to install ``library``."""
    return MissingDependencyError(
        f"running models needs the library {library}, which is not installed; run: pip install 'mergefs[demo]'"
    )
