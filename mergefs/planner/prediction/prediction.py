"""Predicts what a budget leaves out of a merge: what is expected, and what is certain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergefs.planner.levels import Selection
from mergefs.planner.plan import TensorPlan
from mergefs.planner.prediction.bound import bound_of
from mergefs.planner.prediction.evidence import evidence_of
from mergefs.planner.prediction.expected import Expected, expected
from mergefs.planner.prediction.predicted import Prediction
from mergefs.planner.prediction.residuals import residuals_of
from mergefs.planner.prediction.sampled import Candidate, Measured, Sampler
from mergefs.planner.workspace import Workspace


class Predictor:
    """Predicts for any selections of the same tensors; blocks that are merged to that end are merged once."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._sampler = Sampler(workspace)

    def predict(self, tensors: Sequence[TensorPlan], measure: bool = True) -> Prediction:
        """Return the prediction for tensors with selections; those without one are read whole.

        Tensors of methods that are not linear in the deltas are merged both ways, in a sample of their blocks; bytes
        that this reads count as analysis, and what was found is kept in the catalog. Without ``measure`` nothing is
        read: what is not known from there is then expected as if the method were linear.
        """
        linear, others = Totals(), list[Candidate]()
        squared_bound: float | None = 0.0
        left_out = False
        for tensor in tensors:
            # Looked up anew for each prediction, so that not all statistics are in memory at a time.
            evidence = evidence_of(tensor, self._workspace.catalog, self._workspace.statistics)
            if evidence is None:
                continue
            selection = tensor.selection or Selection.everything(tensor.grid, len(tensor.places))
            residuals = residuals_of(tensor, selection, evidence.energies)
            found = expected(tensor, evidence, residuals)
            bound = bound_of(tensor, evidence, residuals)
            squared_bound = None if bound is None or squared_bound is None else squared_bound + bound**2
            left_out = left_out or bool(residuals.affected.any())
            if found.certain_enough:
                linear = linear.plus(found)
            else:
                others.append(Candidate(tensor, found, residuals.affected))
        certain = None if squared_bound is None else math.sqrt(squared_bound)
        if not left_out:
            merged = linear.merged + sum(float(candidate.expected.merged.sum()) for candidate in others)
            return Prediction(0.0, math.sqrt(merged), "exact", bound=0.0)
        measured = self._sampler.known(others) if others else None
        if others and measured is None and measure:
            measured = self._sampler.measure(others)
        if measured is None:
            for candidate in others:
                linear = linear.plus(candidate.expected)
        return _together(linear, measured, certain)


@dataclass(frozen=True, slots=True)
class Totals:
    """Squared norms that are expected of tensors."""

    error: float = 0.0
    merged: float = 0.0

    def plus(self, found: Expected) -> "Totals":
        """Return the totals with one tensor more."""
        return Totals(self.error + float(found.error.sum()), self.merged + float(found.merged.sum()))


def _together(linear: Totals, measured: Measured | None, bound: float | None) -> Prediction:
    """Return the prediction for tensors of both kinds."""
    if measured is None:
        relative = math.sqrt(linear.error / linear.merged) if linear.merged > 0 else 0.0
        return Prediction(relative, math.sqrt(linear.merged), "gram", bound=bound)
    error, merged = linear.error + measured.error, linear.merged + measured.merged
    relative = math.sqrt(error / merged) if merged > 0 else 0.0
    if measured.variance is None:
        return Prediction(relative, math.sqrt(merged), "gram" if linear.merged > 0 else "exact", bound=bound)
    spread = math.sqrt(measured.variance) * measured.merged / merged if merged > 0 else 0.0
    standard_error = spread / (2 * relative) if relative > 0 else 0.0
    return Prediction(relative, math.sqrt(merged), "sampled", standard_error, bound)
