"""The choice between the Python bindings of libfuse, and all that differs between them.

mfusepy (libfuse 3, or 2) is taken when it is installed and loads, fusepy (libfuse 2) otherwise, unless
$MERGEFS_FUSE_BINDING names one. Nothing else in the package imports a binding.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

from mergefs.errors import MountError, UsageError

CHOICE: Final = "MERGEFS_FUSE_BINDING"
"""The environment variable that may name the binding to use."""

SOURCE: Final = "mergefs"
"""What the list of mounts names as the mounted device, where nobody says otherwise."""

WITHOUT_FUSE: Final = (
    "where FUSE cannot be had, `mergefs.open()`, `mergefs.load_state_dict()` and `mergefs materialize` give the same "
    "bytes"
)

_INSTALL: Final = (
    "no usable libfuse was found ({reasons}); install it with `apt-get install libfuse2` (or `fuse3`, together with "
    "`pip install mfusepy`) or `dnf install fuse-libs`; " + WITHOUT_FUSE
)

# Kernel answers may be this old, in seconds. The contents of a plan never change, but a name may be pointed at another
# plan, and that has to show within a second. Reads of an open file ask for neither.
_TIMEOUT: Final = 0.5

_THREADS: Final = 64
_IDLE_THREADS: Final = 16

# What libfuse 3 returns from its main loop when a signal ended it, which is the normal end of a mount.
_ENDED_BY_SIGNAL: Final = 8


class Operations(Protocol):
    """What a binding needs to know of the object whose methods it calls."""

    @property
    def initialised(self) -> bool:
        """Whether the kernel has begun to talk to the file system."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One loaded binding. ``libfuse`` is the version of the C library behind it, major and minor."""

    name: str
    libfuse: tuple[int, int]
    module: ModuleType


class _CallableOperations:
    """Operations as fusepy calls them: the object itself, with the name of the operation.

    mfusepy calls the methods and complains about an object that is callable, so this is not part of the operations.
    """

    use_ns = True

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def __call__(self, name: str, *arguments: Any) -> Any:
        return getattr(self._operations, name)(*arguments)


def _load_mfusepy() -> Binding:
    """Import mfusepy, on libfuse 3 where that is installed; ImportError, OSError or AttributeError if unusable."""
    chosen = {"FUSE_LIBRARY_NAME", "FUSE_LIBRARY_PATH"} & os.environ.keys()
    if not chosen and find_library("fuse3"):
        os.environ["FUSE_LIBRARY_NAME"] = "fuse3"
        try:
            module = importlib.import_module("mfusepy")
        finally:
            del os.environ["FUSE_LIBRARY_NAME"]
    else:
        module = importlib.import_module("mfusepy")
    return Binding("mfusepy", (module.fuse_version_major, module.fuse_version_minor), module)


def _load_fusepy() -> Binding:
    """Import fusepy; ImportError or OSError when it is unusable."""
    module = importlib.import_module("fuse")
    if not hasattr(module, "FuseOSError"):
        raise ImportError(f"{module.__file__} belongs to another package than fusepy")
    return Binding("fusepy", (2, module._libfuse.fuse_version() % 10), module)


LOADERS: Final[Mapping[str, Callable[[], Binding]]] = {"mfusepy": _load_mfusepy, "fusepy": _load_fusepy}
"""How to load each binding, the preferred one first."""


def load_binding() -> Binding:
    """Return the binding that $MERGEFS_FUSE_BINDING names, or else the first of ``LOADERS`` that works here.

    Raises UsageError when the variable names no binding, and MountError, with what to install, when none works.
    """
    choice = os.environ.get(CHOICE)
    if choice and choice not in LOADERS:
        raise UsageError(f"{CHOICE} is {choice!r}, which is no binding of libfuse; set it to {' or '.join(LOADERS)}")
    reasons = []
    for name in [choice] if choice else LOADERS:
        try:
            return LOADERS[name]()
        except ModuleNotFoundError:
            reasons.append(f"{name} is not installed")
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
    raise MountError(_INSTALL.format(reasons="; ".join(reasons)))


def mount_options(
    allow_other: bool, libfuse: tuple[int, int], source: str = SOURCE
) -> dict[str, str | bool | float | int]:
    """Return the options of every mount, in the words of libfuse of that version.

    ``source`` is what the list of mounts names as the mounted device. There is no ``direct_io``, which would break
    mmap.
    """
    options: dict[str, str | bool | float | int] = {
        "ro": True,
        # Encoded as the mount point is, below; a comma would end the option.
        "fsname": os.fsencode(source).decode("latin-1").replace("\\", "\\\\").replace(",", "\\,"),
        "subtype": "mergefs",
        "default_permissions": True,
        "use_ino": True,
        "kernel_cache": True,
        "attr_timeout": _TIMEOUT,
        "entry_timeout": _TIMEOUT,
        "allow_other": allow_other,
    }
    if libfuse >= (3, 12):
        # The default of 10 threads lets 10 slow reads hold up everybody; libfuse 2 knows no limit.
        options |= {"max_threads": _THREADS, "max_idle_threads": _IDLE_THREADS}
    return options


def run(binding: Binding, operations: Operations, mountpoint: Path, allow_other: bool, source: str = SOURCE) -> None:
    """Mount ``operations`` on ``mountpoint`` and serve them until the mount is gone; the calling thread is taken.

    Raises MountError when libfuse could not mount, or when its loop ended with an error.
    """
    wired: object = _CallableOperations(operations) if binding.name == "fusepy" else operations
    try:
        binding.module.FUSE(
            wired,
            # Paths are bytes to the kernel. latin-1 carries any bytes through the binding unharmed, where UTF-8 would
            # raise on a stray byte, outside of everything that the adapter can catch.
            os.fsencode(mountpoint).decode("latin-1"),
            foreground=True,
            encoding="latin-1",
            **mount_options(allow_other, binding.libfuse, source),
        )
    except RuntimeError as error:
        status = error.args[0] if error.args else None
        if operations.initialised and binding.libfuse[0] == 3 and status == _ENDED_BY_SIGNAL:
            return
        what = "ended the mount" if operations.initialised else "could not mount"
        raise MountError(f"libfuse {what} on {mountpoint} with status {status}") from error
