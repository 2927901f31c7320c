"""mergefs: a merged LLM checkpoint that exists as a plan, not as bytes.

with mergefs.open("ties.yml", budget="25%") as model:
    model.get_tensor("lm_head.weight")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergefs.api import MergedModel
    from mergefs.api import open_model as open

__version__ = "0.1.0"
__all__ = ["MergedModel", "__version__", "open"]

_LAZY = {"open": "open_model", "MergedModel": "MergedModel"}


def __getattr__(name: str) -> Any:
    """Import the interface on first use, so that the command line starts without numpy."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mergefs' has no attribute {name!r}")
    from mergefs import api

    return getattr(api, _LAZY[name])
