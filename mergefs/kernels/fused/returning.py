"""Compiled functions that make and return arrays, so that numba has to be there when they run. Importing imports it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compiler import dispatcher_of, to_numba
from mergefs.kernels.fused.kept_code import sources_digest


class ReturningKernel:
    """A function for arguments of the types of ``signature``, compiled when first asked for and kept by numba."""

    def __init__(self, function: Callable[..., Any], signature: types.Signature) -> None:
        self._dispatcher: Any = dispatcher_of(function)
        self._signature = signature
        self._lock = threading.Lock()
        self._is_compiled = False
        # Where no directory can be written there is no cache: the function is then compiled in memory.
        with suppress(RuntimeError, OSError):
            self._dispatcher._cache = _make_cache(function)

    def compiled(self) -> Callable[..., Any]:
        """Return the function after making sure that there is machine code."""
        with self._lock:
            if not self._is_compiled:
                self._dispatcher.compile(tuple(map(to_numba, self._signature)))
                # Or a call with an int, where an address is meant, would compile it once more for that.
                self._dispatcher.disable_compile(True)
                self._is_compiled = True
        function: Callable[..., Any] = self._dispatcher
        return function


class _KernelCache(FunctionCache):
    """numba's cache on disk, with two things that it lacks.

    Its keys know nothing of the other modules that a kernel is made of, so old code could outlive a change in them;
    and what it cannot read or write, it raises, where compiling in memory would serve.
    """

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        """Add a digest of the sources of this package, and of that of the kernel, to the key."""
        key: Callable[[Any, Any], tuple[Any, ...]] = super()._index_key
        kernels = Path(self._py_func.__code__.co_filename).parent
        return (*key(signature, codegen), sources_digest(Path(__file__).parent), sources_digest(kernels))

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
