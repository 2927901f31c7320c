"""How planned tensors answer to their inputs."""

import numpy as np

from mergefs.methods.contract import Response
from mergefs.planner.plan import TensorPlan
from mergefs.statistics.service import StatisticsService


def response_of(tensor: TensorPlan, statistics: StatisticsService) -> Response | None:
    """Return the response of a tensor, None of one that is copied.

    What its method must know of the whole tensor comes from the catalog; what is not there yet is gathered.
    """
    method, context = tensor.method, tensor.context
    if method is None or context is None:
        return None
    # A number of the recipe may be too large for a dtype: a response that is not finite is none.
    with np.errstate(all="ignore"):
        return method.response(context, statistics.all_answers(method, context, tensor.places))
