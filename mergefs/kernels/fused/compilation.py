"""Kernels: machine code for each compute dtype, from the disk or, where that has none, from the compiler."""

import threading
from collections.abc import Callable
from typing import Any

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.calling import CompiledKernel
from mergefs.kernels.fused.kept_code import KeptCode
from mergefs.kernels.fused.machine_code import MachineCode, load
from mergefs.kernels.fused.marks import inlined
from mergefs.kernels.fused.values import ELEMENTS

__all__ = ["Kernel", "inlined"]


class Kernel:
    """A kernel for every compute dtype, loaded or compiled when first asked for.

    ``signature`` gives the types of the arguments for the element types that stand for the dtypes that ``function`` is
    about. ``function`` leaves what it finds in the arrays that it is given: it returns nothing and makes no arrays.
    With ``for_statistics`` there is one more specialisation for each: for inputs that are carried in F32.
    """

    def __init__(
        self, function: Callable[..., Any], signature: Callable[..., types.Signature], for_statistics: bool = False
    ) -> None:
        self.for_statistics = for_statistics
        self.loaded_from_disk = 0
        self._function = function
        self._signature = signature
        self._lock = threading.Lock()
        self._compiled: dict[tuple[DType, ...], CompiledKernel] = {}

    def compiled(self, *dtypes: DType) -> CompiledKernel:
        """Return the kernel for ``dtypes``."""
        found = self._compiled.get(dtypes)
        if found is None:
            with self._lock:
                found = self._compiled.get(dtypes)
                if found is None:
                    found = self._compiled[dtypes] = self._make(self._signature(*(ELEMENTS[dtype] for dtype in dtypes)))
        return found

    @property
    def specialisations(self) -> int:
        """How many specialisations there are."""
        return len(self._compiled)

    def _make(self, signature: types.Signature) -> CompiledKernel:
        """Load a specialisation, or compile it and keep that for the next process."""
        kept = KeptCode(self._function, signature)
        code = kept.load()
        if code is not None:
            self.loaded_from_disk += 1
        else:
            code = _compile(self._function, signature)
            kept.save(code)
        return CompiledKernel(self._function.__qualname__, load(code), signature)


def _compile(function: Callable[..., Any], signature: types.Signature) -> MachineCode:
    """Compile a kernel: the only thing that needs a compiler."""
    from mergefs.kernels.fused.compiler import compile_kernel

    return compile_kernel(function, signature)
