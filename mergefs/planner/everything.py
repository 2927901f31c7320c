"""Plans without a choice: tensors of which all is read that nothing else has, and tensors that are copied."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mergefs.catalog.catalog import Catalog
from mergefs.planner.plan import TensorPlan
from mergefs.planner.stock import all_blocks_differ, deltas_of, stock_of
from mergefs.sources.place import Role


def select_everything(tensors: Sequence[TensorPlan], catalog: Catalog) -> tuple[TensorPlan, ...]:
    """Return the tensors, all read, but that blocks are not which are known to be the base's, or another input's.

    Nothing needs to be known, and a tensor of which nothing useful is stays without a selection.
    """
    return tuple(map(partial(_everything, catalog=catalog), tensors))


def _everything(tensor: TensorPlan, catalog: Catalog) -> TensorPlan:
    """Return the plan of a tensor that reads every byte that differs from the base's, and none twice."""
    if tensor.context is None or all_blocks_differ(tensor, catalog):
        return tensor
    stock = stock_of(tensor, deltas_of(tensor, catalog), catalog)
    return replace(tensor, selection=stock.everything()) if stock.saves else tensor


def copied_from_the_base(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a copied tensor with the stand-in in the place of an expert: all models have it alike."""
    if tensor.context is not None or tensor.stand_in is None:
        return tensor
    return replace(tensor, places=(tensor.stand_in,), roles=(Role.BASE,))
