"""What chunks need is on its way before their turn: bytes from the disk, and what has to be known of whole tensors.

What is read to learn something of a tensor is held until its chunks are computed from it, so a tensor of which nothing
is known is read once. It is held for a few tensors at a time, as far as memory allows.
"""

import threading
from concurrent.futures import Executor
from typing import Final

from mergefs.engine.engine import Engine
from mergefs.planner.plan import OutputFile

_TENSORS_AHEAD: Final = 2


class Preparation:
    """Prepares the tensors of a plan in the order of ``files``, on a pool of threads.

    ``capacity`` is how many bytes of inputs can be held. A tensor that there is no room for beside those that are held
    already is prepared by the first of its own chunks.
    """

    def __init__(self, engine: Engine, files: list[OutputFile], pool: Executor, capacity: int) -> None:
        self._engine = engine
        self._pool = pool
        self._left = capacity
        self._lock = threading.Lock()
        tensors = engine.plan.tensors
        self._names = [name for file in files for name in file.tensors]
        self._number = {name: number for number, name in enumerate(self._names)}
        self._sizes = [
            sum(stored.nbytes for stored in tensors[name].stored()) if tensors[name].context is not None else 0
            for name in self._names
        ]
        self._next = 0

    def reach(self, name: str) -> None:
        """Note that a chunk of a tensor is about to be computed, and begin with those that follow."""
        number = self._number[name]
        with self._lock:
            while self._next <= number:
                self._left -= self._sizes[self._next]
                self._next += 1
            begun = []
            while self._next <= min(number + _TENSORS_AHEAD, len(self._names) - 1):
                if self._sizes[self._next] > self._left:
                    break
                self._left -= self._sizes[self._next]
                begun.append(self._names[self._next])
                self._next += 1
        for one in begun:
            self._pool.submit(self._engine.prepare_tensor, one)  # its chunks will meet the same error

    def finish(self, name: str) -> None:
        """Let go of a tensor that all chunks are computed of."""
        self._engine.forget_tensor(name)
        number = self._number[name]
        with self._lock:
            if number < self._next:
                self._left += self._sizes[number]
            self._sizes[number] = 0
