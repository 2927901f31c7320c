"""How the memory that writing models may take is divided."""

from dataclasses import dataclass
from typing import Final

from mergefs.engine.resources import SMALLEST_CACHE_SIZE, WORKING_MEMORY
from mergefs.errors import UsageError
from mergefs.materialize.weights import CHUNK
from mergefs.materialize.writer import chunks_at_a_time
from mergefs.units import format_size

DEFAULT_MEMORY: Final = 2 * 2**30
_PROGRAM: Final = 192 * 2**20
"""For Python, numpy, compiled kernels, and plans of some thousand tensors."""
UNUSED: Final = 64 * 2**20
"""What the allocator keeps of freed blocks."""
_LOST: Final = 16
"""The part of all memory, one in so many, that is lost between blocks of different sizes."""
_LARGEST_CACHE: Final = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes for blocks that are wanted again, and for inputs that something has to be learned from first."""

    cache: int
    held: int

    @classmethod
    def of(cls, total: int, threads: int) -> "Memory":
        """Divide ``total`` bytes for the whole process. Raises UsageError when that is too little."""
        fixed = _PROGRAM + UNUSED + WORKING_MEMORY + chunks_at_a_time(threads) * CHUNK
        smallest = fixed + 2 * SMALLEST_CACHE_SIZE
        if total < smallest:
            raise UsageError(
                f"--memory {format_size(total)} is too little for {threads} threads; give at least "
                f"{format_size(smallest)}, or fewer --threads"
            )
        cache = min(max((total - fixed) // 4, SMALLEST_CACHE_SIZE), _LARGEST_CACHE)
        return cls(cache, total - fixed - cache - total // _LOST)
