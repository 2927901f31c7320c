"""The merges and the families of models that several tests are held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from checkpoints import HIDDEN, LAYERS, VOCABULARY, Family
from recipes import Merge

METHODS: Final[dict[str, Merge]] = {
    "linear": Merge("linear", ({"weight": 0.6}, {"weight": 0.3}), with_base=False),
    "task_arithmetic": Merge("task_arithmetic", ({"weight": 0.7}, {"weight": 0.4})),
    "ties": Merge("ties", ({"weight": 0.7, "density": 0.6}, {"weight": 0.4, "density": 0.3})),
    "dare_linear": Merge("dare_linear", ({"weight": 0.7, "density": 0.6}, {"weight": 0.4, "density": 0.3})),
    "dare_ties": Merge("dare_ties", ({"weight": 0.7, "density": 0.6}, {"weight": 0.4, "density": 0.3})),
    "breadcrumbs": Merge(
        "breadcrumbs", ({"weight": 0.7, "density": 0.6, "gamma": 0.05}, {"weight": 0.4, "density": 0.9})
    ),
    "breadcrumbs_ties": Merge(
        "breadcrumbs_ties", ({"weight": 0.7, "density": 0.6, "gamma": 0.05}, {"weight": 0.4, "density": 0.3})
    ),
    "della": Merge("della", ({"weight": 0.7, "density": 0.6, "epsilon": 0.3}, {"weight": 0.4, "density": 0.3})),
    "della_linear": Merge(
        "della_linear", ({"weight": 0.7, "density": 0.6, "epsilon": 0.3}, {"weight": 0.4, "density": 0.3})
    ),
    "nuslerp": Merge("nuslerp", ({"weight": 0.6}, {"weight": 0.3})),
    "multislerp": Merge("multislerp", ({"weight": 0.6}, {"weight": 0.3}), with_base=False),
    "karcher": Merge("karcher", ({}, {}), {"max_iter": 4}, with_base=False),
    "sce": Merge("sce", ({}, {}), {"select_topk": 0.4}),
    "arcee_fusion": Merge("arcee_fusion", ({},)),
    "model_stock": Merge("model_stock", ({}, {})),
    "nearswap": Merge("nearswap", ({},), {"t": 0.001}),
    "ramplus_tl": Merge("ramplus_tl", ({}, {}), {"epsilon": 1e-2, "r": 0.7, "alpha": 2.0}),
    "ram": Merge("ram", ({}, {}), {"epsilon": 1e-4}),
    "slerp": Merge("slerp", ({},), {"t": 0.3}),
    "passthrough": Merge("passthrough", ({"scale": 0.7},), with_base=False),
}
"""Every method, with parameters that leave no shortcut."""


def experts(*parameters: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    """Return the parameters of experts from a weight, or a weight and a density, of each."""
    return tuple(dict(zip(("weight", "density"), values, strict=False)) for values in parameters)


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """The arguments of ``checkpoints.family``: which models a test wants."""

    dtype: torch.dtype = torch.bfloat16
    tied: bool = False
    shards: int = 1
    experts: int = 2
    hidden: int = HIDDEN
    layers: int = LAYERS
    vocabulary: int = VOCABULARY

    @property
    def text(self) -> str:
        """Name the kind, for test ids and directories."""
        dtype = str(self.dtype).removeprefix("torch.")
        ties = "tied" if self.tied else "untied"
        size = f"{self.layers}x{self.hidden}x{self.vocabulary}"
        return f"{dtype}-{ties}-{self.shards}-shards-{self.experts}-experts-{size}"


Families = Callable[[FamilyKind], Family]
