"""What every merge method promises, as checks that any test runner can call.

``check_method(method)`` runs them all, on tensors that exist in memory alone; ``CHECKS`` has each by its name. The
built-in methods pass them, and so must a method that another package registers.
"""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from mergefs.methods.contract import Method
from mergefs.testing.arithmetic import check_fused, check_ranges, check_results
from mergefs.testing.declaration import check_kernels, check_specification
from mergefs.testing.knowledge import check_statistic_keys, check_statistics
from mergefs.testing.response import check_linearity, check_response
from mergefs.testing.trial import ContractError

__all__ = ["CHECKS", "Check", "ContractError", "check_method"]

Check: TypeAlias = Callable[[Method[Any]], None]

CHECKS: Final[dict[str, Check]] = {
    "specification": check_specification,
    "kernels": check_kernels,
    "results": check_results,
    "ranges": check_ranges,
    "fused": check_fused,
    "statistics": check_statistics,
    "statistic keys": check_statistic_keys,
    "response": check_response,
    "linearity": check_linearity,
}
"""Every check by its name: it takes a method, and raises ContractError where the method does not keep a promise."""


def check_method(method: Method[Any]) -> None:
    """Run every check on ``method``. Raises ContractError, which says what is wrong and for which small tensor."""
    for check in CHECKS.values():
        check(method)
