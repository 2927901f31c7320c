"""Machine code of kernels: for which CPU it is, and how a process loads it, by LLVM and without a compiler."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import llvmlite
import llvmlite.binding as llvm

ENTRY: Final = "mergefs_kernel"
"""What a kernel is called in its machine code."""

_CHOICES: Final = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")
"""Environment variables by which numba lets people choose the CPU that it compiles for, and how."""


@dataclass(frozen=True, slots=True)
class MachineCode:
    """An object file with one kernel, and the functions of the C library that it calls."""

    calls: tuple[str, ...]
    code: bytes


def load(machine_code: MachineCode) -> int:
    """Return the address of a kernel that stays in this process. Raises OSError where something that it calls lacks."""
    machine = _target().create_target_machine(jit=True, codemodel="jitdefault")
    for name in machine_code.calls:
        if llvm.address_of_symbol(name) is None:
            raise OSError(f"compiled code calls {name!r}, which this process does not have")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code.code))
    engine.finalize_object()
    _LOADED.append(engine)
    address: int = engine.get_function_address(ENTRY)
    return address


_LOADED: Final[list[Any]] = []
"""What holds the code: it is called as long as the process lives."""


@cache
def _target() -> Any:
    """Return the kind of this machine, once LLVM is ready to place code for it in memory."""
    with suppress(RuntimeError):  # of versions that are ready when they are imported
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple())


@cache
def circumstances() -> str:
    """Return all that machine code depends on beside the kernel itself: the CPU, and what compiles for it."""
    features = llvm.get_host_cpu_features().flatten()
    compilers = llvmlite.__version__, *map(str, llvm.llvm_version_info), _version_of_numba(), sys.version
    choices = (f"{name}={os.environ.get(name, '')}" for name in _CHOICES)
    return "\n".join((llvm.get_process_triple(), llvm.get_host_cpu_name(), features, *compilers, *choices))


def _version_of_numba() -> str:
    """Return what tells versions of numba apart, without importing it: the state of the file that has the version."""
    found = find_spec("numba")
    if found is None or found.origin is None:
        return ""
    try:
        status = Path(found.origin).with_name("_version.py").stat()
    except OSError:
        return found.origin
    return f"{found.origin} {status.st_size} {status.st_mtime_ns}"
