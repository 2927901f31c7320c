"""Made-up statistics of models that hold nothing: norms, sketches and hashes of all blocks, put into a catalog.

Statistics of sparse files would be those of zeros, and any plan of them a trivial one.
"""

from pathlib import Path
from typing import Final

import numpy as np

from mergefs.catalog import Catalog
from mergefs.catalog.records import ContentRecord
from mergefs.checkpoint.dtypes import BF16
from mergefs.engine.workspace import Workspace
from mergefs.kernels.sketch import quantised
from mergefs.planner.build import PlanOptions, draft_plan
from mergefs.planner.plan import TensorPlan
from mergefs.recipe.model import load_recipe
from mergefs.sources.place import Role
from mergefs.statistics.blocks import HASH_BYTES, BlockDeltas, pack, pack_norms
from mergefs.statistics.identity import KEY_BYTES, local_key, statistic_key

SKETCH: Final = 128


def made_deltas(generator: np.random.Generator, blocks: int, experts: int) -> list[BlockDeltas]:
    """Return block statistics of experts whose deltas have something in common, of blocks of any size."""
    common = 0.5 * generator.standard_normal((blocks, SKETCH), dtype=np.float32)
    scale = np.exp(generator.normal(0, 0.7, blocks)).astype(np.float32)
    found = []
    for _ in range(experts):
        values = common + generator.standard_normal((blocks, SKETCH), dtype=np.float32)
        values *= (scale * np.exp(generator.normal(0, 0.5, blocks)))[:, np.newaxis]
        sketches, scales = quantised(values.astype(np.float32))
        norms = (values.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)
        changed = np.full(blocks, 1000, dtype=np.uint32)
        found.append(BlockDeltas(norms, norms, norms, changed, sketches, scales))
    return found


def fill_catalog(recipe: Path, location: Path) -> None:
    """Put made-up statistics of all tensors of a family into the catalog at ``location``."""
    generator = np.random.default_rng(1)
    with Catalog(location) as catalog:
        for tensor in draft_plan(load_recipe(recipe), PlanOptions(), Workspace.create(catalog)).tensors:
            fill_tensor(tensor, catalog, generator)
            catalog.flush()


def fill_tensor(tensor: TensorPlan, catalog: Catalog, generator: np.random.Generator) -> None:
    """Put made-up statistics of one tensor into the catalog."""
    blocks = tensor.grid.count
    digests = [generator.bytes(KEY_BYTES) for _ in tensor.places]
    for place, digest in zip(tensor.places, digests, strict=True):
        catalog.keep_content(local_key(place), ContentRecord(digest, generator.bytes(blocks * HASH_BYTES)))
    base = digests[tensor.roles.index(Role.BASE)]
    catalog.keep_norms(statistic_key("norms", BF16, 0, (base,)), pack_norms([1.0] * blocks))
    experts = [digest for digest, role in zip(digests, tensor.roles, strict=True) if role is Role.EXPERT]
    for digest, deltas in zip(experts, made_deltas(generator, blocks, len(experts)), strict=True):
        catalog.keep_delta(statistic_key("delta", BF16, 0, (digest, base)), pack(deltas))
