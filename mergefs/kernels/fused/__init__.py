"""Kernels compiled by numba that go over the bytes of a block once, bit for bit equal to the numpy reference.

They work where every input is stored in the compute dtype, and the result is. numba is imported when a kernel is asked
for that the disk has no machine code of, and not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from mergefs.checkpoint.dtypes import BF16, F16, F32, DType

if TYPE_CHECKING:
    from mergefs.kernels.fused.compilation import Kernel

FUSED_DTYPES: Final[tuple[DType, ...]] = (BF16, F16, F32)
"""The compute dtypes that there are fused kernels for."""


def prepare(
    modules: Iterable[str],
    dtypes: Iterable[DType] = FUSED_DTYPES,
    conversions: Iterable[tuple[DType, DType]] = (),
) -> None:
    """Compile, or load from the cache, the kernels of ``modules`` for the compute dtypes ``dtypes``.

    A name without a dot is a module of this package, any other is absolute; each has a ``KERNEL``, or ``KERNELS``.
    ``conversions`` are the pairs of a dtype and the one that it is converted to, from stored to compute and from
    compute to output. After this no read waits for a compiler. Dtypes without fused kernels are passed over.
    """
    wanted = tuple(dtype for dtype in dtypes if dtype in FUSED_DTYPES)
    for module in dict.fromkeys(modules) if wanted else ():
        found = importlib.import_module(module if "." in module else f"{__name__}.{module}")
        kernels: tuple[Kernel, ...] = getattr(found, "KERNELS", None) or (found.KERNEL,)
        for kernel in kernels:
            for dtype in wanted:
                kernel.compiled(dtype)
                if kernel.for_statistics:
                    kernel.compiled(dtype, F32)
    pairs = [pair for pair in conversions if pair[0] != pair[1] and set(pair) <= set(FUSED_DTYPES)]
    if pairs:
        from mergefs.kernels.fused.conversion import KERNEL

        for stored, target in pairs:
            KERNEL.compiled(target, stored)
