"""What a read does when there is no memory: the cache is given up before the reader is."""

import logging
import time
from collections.abc import Callable
from typing import Final

from mergefs.sources.cache import BlockCache

_LOG = logging.getLogger(__name__)

_PAUSES: Final = (0.0, 0.05, 0.2, 0.5)
"""Seconds to wait before work is tried again that memory has run out in, each time."""


def despite_shortage(work: Callable[[], bytes], cache: BlockCache) -> bytes:
    """Return what ``work`` does; where memory runs out, empty ``cache`` and do it again, a few times.

    Raises MemoryError when there is none all the same, and whatever ``work`` raises.
    """
    for pause in _PAUSES:
        try:
            return work()
        except MemoryError:
            given_up = cache.clear()
        # Outside of the handler, so that what the traceback holds is free, too.
        _LOG.warning("there is no memory left: %d bytes of cache are given up for it", given_up)
        time.sleep(pause)
    return work()
