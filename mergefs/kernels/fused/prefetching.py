"""Inputs on their way from memory before kernels need them."""

from typing import Any

import numpy as np

from mergefs.kernels.fused.compilation import inlined
from mergefs.kernels.fused.values import prefetched

_LINE = 64
"""Bytes of a line of the cache."""


@inlined
def request(result: Any, address: Any, first: Any, count: Any) -> Any:
    """Have the memory send the tile that begins at ``first``, a line of the cache at a time.

    Of so many inputs read by turns the CPU does not see itself that they go on, and it would wait for each of them.
    """
    line = np.uint64(_LINE // result.itemsize)
    for i in range(np.uint64(0), count, line):
        prefetched(address, first + i, result)
