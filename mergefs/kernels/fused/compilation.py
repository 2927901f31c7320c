"""Compiles kernels, one specialisation for each compute dtype, and keeps the machine code on disk where it can."""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from blake3 import blake3
from numba.core.caching import FunctionCache

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused.values import ELEMENTS

_njit: Callable[..., Any] = numba.njit


def inlined(function: Callable[..., Any]) -> Any:
    """Make ``function`` a part of the kernels that call it; it is compiled and cached with them."""
    return _njit(nogil=True, error_model="numpy", boundscheck=False)(function)


class Kernel:
    """A kernel for every compute dtype, compiled when first asked for.

    ``signature`` gives the numba signature for the element types that stand for the dtypes that ``function`` is about.
    With ``for_statistics`` there is one more specialisation for each: for inputs that are carried in F32.
    """

    def __init__(
        self, function: Callable[..., Any], signature: Callable[..., Any], for_statistics: bool = False
    ) -> None:
        self.for_statistics = for_statistics
        self._dispatcher: Any = inlined(function)
        self._signature = signature
        self._lock = threading.Lock()
        self._compiled: set[tuple[DType, ...]] = set()
        # Where no directory can be written there is no cache: the kernels are then compiled in memory.
        with suppress(RuntimeError, OSError):
            self._dispatcher._cache = _make_cache(function)

    def compiled(self, *dtypes: DType) -> Callable[..., Any]:
        """Return the kernel after making sure that there is machine code for ``dtypes``."""
        if dtypes not in self._compiled:
            with self._lock:
                self._dispatcher.disable_compile(False)
                self._dispatcher.compile(self._signature(*(ELEMENTS[dtype] for dtype in dtypes)))
                # Or a call with an int, where an address is meant, would compile the kernel once more for that.
                self._dispatcher.disable_compile(True)
                self._compiled.add(dtypes)
        kernel: Callable[..., Any] = self._dispatcher
        return kernel

    @property
    def specialisations(self) -> int:
        """How many specialisations there are."""
        return len(self._dispatcher.signatures)

    @property
    def loaded_from_cache(self) -> int:
        """How many specialisations came from the cache instead of the compiler."""
        return sum(self._dispatcher.stats.cache_hits.values())


class _KernelCache(FunctionCache):
    """numba's cache on disk, with two things that it lacks.

    Its keys know nothing of the other modules that a kernel is made of, so old code could outlive a change in them;
    and what it cannot read or write, it raises, where compiling in memory would serve.
    """

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        """Add a digest of the sources of this package, and of that of the kernel, to the key."""
        key: Callable[[Any, Any], tuple[Any, ...]] = super()._index_key
        kernels = Path(self._py_func.__code__.co_filename).parent
        return (*key(signature, codegen), _sources_digest(Path(__file__).parent), _sources_digest(kernels))

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the cached code, or None where there is none or it cannot be read."""
        load: Callable[[Any, Any], Any] = super().load_overload
        try:
            return load(signature, target_context)
        except Exception:  # a damaged file makes unpickling raise anything
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep the code for the next process, if the disk lets it."""
        save: Callable[[Any, Any], None] = super().save_overload
        with suppress(Exception):
            save(signature, data)


_make_cache: Callable[[Callable[..., Any]], _KernelCache] = _KernelCache


@cache
def _sources_digest(package: Path) -> str:
    """Return the digest of the sources of a package."""
    digest = blake3()
    for source in sorted(package.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
