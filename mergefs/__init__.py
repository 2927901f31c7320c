"""mergefs: a merged LLM checkpoint that exists as a plan, not as bytes.

with mergefs.open("ties.yml", budget="25%") as model:
    model.get_tensor("lm_head.weight")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergefs.api import MergedModel
    from mergefs.api import open_model as open
    from mergefs.evaluation.loading import load_state_dict

__version__ = "0.1.0"
__all__ = ["MergedModel", "__version__", "load_state_dict", "open"]

_LAZY = {
    "open": ("mergefs.api", "open_model"),
    "MergedModel": ("mergefs.api", "MergedModel"),
    "load_state_dict": ("mergefs.evaluation.loading", "load_state_dict"),
}


def __getattr__(name: str) -> Any:
    """Import the interface on first use, so that the command line starts without numpy."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mergefs' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
