"""Compiles kernels with numba, which is imported with this module and by nothing else.

A kernel is written as plain Python that calls functions marked as ``inlined`` and ``Instruction``s; here numba's own
objects take their places. What numba makes of that, as text of LLVM, becomes machine code for this CPU.
"""

from collections.abc import Callable
from functools import cache
from types import CellType, FunctionType
from typing import Any, Final

import llvmlite.binding as llvm
import numba
from numba.core import types as numba_types

from mergefs.kernels.fused import instructions, types
from mergefs.kernels.fused.machine_code import ENTRY, MachineCode
from mergefs.kernels.fused.marks import Instruction, is_inlined

_njit: Callable[..., Any] = numba.njit
_OPTIONS: Final = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_ALONE: Final = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
"""Nothing calls a kernel through Python's objects, and none takes memory: it needs nothing of numba when it runs."""

_OPTIMISATION: Final = 3


def compile_kernel(function: Callable[..., Any], signature: types.Signature) -> MachineCode:
    """Return the machine code of a kernel for arguments of these types.

    Raises TypeError for a kernel that returns something, and the errors of numba for what it cannot compile.
    """
    dispatcher = _njit(**_OPTIONS, **_ALONE)(bound(function))
    dispatcher.compile(tuple(map(to_numba, signature)))
    (compiled,) = dispatcher.overloads.values()
    if compiled.signature.return_type not in (numba_types.none, numba_types.void):
        raise TypeError(f"the kernel {function.__qualname__} returns a {compiled.signature.return_type}")
    triple, cpu, features = compiled.library.codegen.magic_tuple()
    (text,) = dispatcher.inspect_llvm().values()
    module = llvm.parse_assembly(text)
    module.get_function(compiled.fndesc.llvm_func_name).name = ENTRY
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=_OPTIMISATION, jit=True, codemodel="jitdefault"
    )
    called = (one.name for one in module.functions if one.is_declaration and not one.name.startswith("llvm."))
    return MachineCode(tuple(called), machine.emit_object(module))


def dispatcher_of(function: Callable[..., Any]) -> Any:
    """Return numba's own object for a function that Python calls through it, and that may return arrays."""
    return _njit(**_OPTIONS)(bound(function))


def to_numba(wanted: types.Type) -> Any:
    """Return what numba calls a type."""
    if isinstance(wanted, types.Scalar):
        return getattr(numba_types, wanted.name)
    element = wanted.element
    inner = numba.from_dtype(element.fields) if isinstance(element, types.Record) else to_numba(element)
    return numba_types.Array(inner, wanted.dimensions, wanted.layout, readonly=wanted.readonly)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of ``function`` that calls numba's objects instead of those that carry the marks."""
    known, used = function.__globals__, function.__code__.co_names
    names = known | {name: _bound_object(known[name]) for name in used if name in known}
    closure = tuple(CellType(_bound_object(cell.cell_contents)) for cell in function.__closure__ or ())
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure or None)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return copy


def _bound_object(found: Any) -> Any:
    """Return what stands in the place of an object that a kernel refers to by name."""
    if isinstance(found, Instruction):
        return getattr(instructions, found.name)
    if isinstance(found, FunctionType) and is_inlined(found):
        return _dispatcher_of_part(found)
    return found


@cache
def _dispatcher_of_part(function: Callable[..., Any]) -> Any:
    """Return numba's object for a function that becomes a part of kernels."""
    return dispatcher_of(function)
