"""What is known of what a budget leaves out of a merge."""

from dataclasses import dataclass
from typing import Final, Literal

How = Literal["exact", "gram", "sampled"]
"""Where a prediction comes from: there is nothing to predict, since everything that matters was computed or bought;
norms and angles of the deltas, for methods that are linear in them; or blocks that were merged both ways."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is known of a budgeted merge. Norms are Euclidean, over all elements of the model.

    ``relative_error`` is the expected norm of (budgeted - full merge) divided by ``merged_norm``, that of (full merge -
    base), which is an estimate too and None where it is not known; ``standard_error`` is that of a sampled one.
    ``bound`` is a norm of (budgeted - full merge) that is never exceeded, None where nothing is certain.
    """

    relative_error: float
    merged_norm: float | None
    how: How
    standard_error: float | None = None
    bound: float | None = None

    @property
    def relative_bound(self) -> float | None:
        """The bound divided by the expected norm of the merged delta."""
        if self.bound == 0:
            return 0.0
        return self.bound / self.merged_norm if self.bound is not None and self.merged_norm else None


NOTHING_LEFT_OUT: Final = Prediction(0.0, None, "exact", bound=0.0)
"""The prediction of a plan that reads everything, which needs no statistics."""
