"""What becomes of an exception inside a FUSE callback: one line in the log and an errno, always.

The bindings turn some exceptions into a silent end of file and others into EINVAL, so none may reach them except an
``OSError`` with an errno that the kernel takes for what it is.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable
from typing import Concatenate, Final, ParamSpec, TypeVar

from mergefs.errors import MergefsError

_log = logging.getLogger("mergefs.mount")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Self = TypeVar("_Self")

# Answers to questions that programs ask all the time; nothing is wrong when they get them.
_ORDINARY: Final = frozenset(
    {
        errno.ENOENT,
        errno.ENODATA,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EROFS,
        errno.ENOTTY,
        errno.ENAMETOOLONG,
        errno.EOPNOTSUPP,
    }
)

# Errnos that would be taken for something else on the way: EINVAL says that the caller asked wrongly, ENOSYS makes the
# kernel give up the whole operation for the life of the mount, ENOTCONN looks like a crashed server.
_MISLEADING: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTCONN})


class WrongAnswerError(Exception):
    """The tree gave something that cannot be handed to the kernel: a programming error, answered with EIO."""


def answerable(code: object) -> int:
    """Return ``code`` if it is an errno that the kernel takes as an answer, else EIO.

    A number that is no errno must not reach the kernel: it refuses the answer, and the reader waits forever.
    """
    if isinstance(code, int) and code in errno.errorcode and code not in _MISLEADING:
        return code
    return errno.EIO


def log_failure(operation: str, path: object, error: BaseException) -> int:
    """Write one record about ``error`` to the log and return the errno to answer with."""
    where = f"{operation} {path!r}"
    if isinstance(error, MergefsError):
        code = answerable(error.errno)
        _log.warning("%s: %s (answered %s)", where, error, errno.errorcode[code])
        return code
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        code = answerable(error.errno)
        level = logging.DEBUG if code in _ORDINARY else logging.WARNING
        _log.log(level, "%s: %s (answered %s)", where, error, errno.errorcode[code])
        return code
    if isinstance(error, MemoryError):
        _log.warning(
            "%s: there is no memory left for it; give the mount a smaller --cache-size (answered ENOMEM)", where
        )
        return errno.ENOMEM
    _log.error("%s: unexpected %s (answered EIO)", where, type(error).__name__, exc_info=error)
    return errno.EIO


def guarded(
    operation: Callable[Concatenate[_Self, _Parameters], _Result],
) -> Callable[Concatenate[_Self, _Parameters], _Result]:
    """Wrap a FUSE operation so that the only exception that leaves it is an OSError with an answerable errno."""
    name = operation.__name__

    @functools.wraps(operation)
    def guard(self: _Self, /, *arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> _Result:
        try:
            return operation(self, *arguments, **keywords)
        except BaseException as error:
            try:
                code = log_failure(name, arguments[0] if arguments else None, error)
            except BaseException:  # a full disk under the log must not change the answer's kind
                code = errno.EIO
        # Outside of the handler, so that the traceback and all that it holds is dropped.
        raise OSError(code, os.strerror(code))

    return guard
