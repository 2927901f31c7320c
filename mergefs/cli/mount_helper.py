"""``mergefs SOURCE MOUNTPOINT -o OPTIONS``, which is how mount(8) and /etc/fstab have FUSE file systems mounted.

``mount -t fuse.mergefs`` runs libfuse's ``mount.fuse``, and that runs ``mergefs`` in such words. They are translated
into those of ``mergefs mount``.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import click

from mergefs.cli.registry import COMMANDS
from mergefs.errors import UsageError

_IGNORED: Final = {
    *("defaults", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "default_permissions"),
    *("auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"),
    *("async", "sync", "dirsync", "mand", "nomand", "loud", "silent", "iversion", "noiversion"),
    *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("lazytime", "nolazytime"),
}
"""What mount(8) passes on and every mount of ours has, or has no use for: all are read-only, without devices."""

_FOR_MOUNT_ITSELF: Final = ("x-", "X-", "comment=", "uhelper=", "helper=")
_COMMA: Final = re.compile(r"(?<!\\),")
_FLAGS: Final = frozenset({"-n", "-s", "-v"})
_WITH_VALUE: Final = frozenset({"-o", "-t"})


def translate_helper_call(arguments: Sequence[str]) -> list[str] | None:
    """Return the words for ``mergefs`` that say the same as a call by mount(8); None where it is no such call.

    Raises UsageError for an option that neither mount(8) nor ``mergefs mount`` has.
    """
    if len(arguments) < 4 or arguments[0] in COMMANDS or arguments[0].startswith("-"):
        return None
    source, mountpoint, *rest = arguments
    options: list[str] = []
    words = iter(rest)
    for word in words:
        if word in _WITH_VALUE:
            value = next(words, None)
            if value is None:
                return None
            options += _COMMA.split(value) if word == "-o" else []
        elif word not in _FLAGS:
            return None
    if "-o" not in rest:
        return None
    before, after = _Options().translate(options)
    return [*before, "mount", "--fsname", source, *after, "--", source, mountpoint]


class _Options:
    """The options of ``mergefs`` and of ``mergefs mount`` by the names that they have in /etc/fstab."""

    def __init__(self) -> None:
        from mergefs.cli.group import cli
        from mergefs.cli.mount import command

        self._general = dict(_named(cli))
        self._of_mount = dict(_named(command))
        # mount(8) waits for the end of what it runs.
        del self._of_mount["foreground"]

    def translate(self, options: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the words that stand before ``mount`` and those that stand after it."""
        before: list[str] = []
        after: list[str] = []
        for option in options:
            if option in _IGNORED or not option or option.startswith(_FOR_MOUNT_ITSELF):
                continue
            name, equals, value = option.replace("\\,", ",").partition("=")
            name = name.replace("-", "_")
            if name in self._of_mount:
                after += _words(self._of_mount[name], name, value if equals else None)
            elif name in self._general:
                before += _words(self._general[name], name, value if equals else None)
            else:
                raise UsageError(
                    f"there is no mount option {name!r}; use the options of `mergefs mount --help`, such as "
                    "budget=25% or allow_other, or those of mount(8)"
                )
        return before, after


def _named(command: click.Command) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield the names of a command's options, each with its spelling and whether it is a flag."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            is_flag = parameter.is_flag or parameter.count
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                if spelling.startswith("--"):
                    yield spelling[2:].replace("-", "_"), (spelling, is_flag)


def _words(option: tuple[str, bool], name: str, value: str | None) -> list[str]:
    """Return an option as it stands on the command line."""
    spelling, is_flag = option
    if is_flag:
        if value is not None:
            raise UsageError(f"the mount option {name} takes no value; write {name} alone")
        return [spelling]
    if value is None:
        raise UsageError(f"the mount option {name} takes a value; write {name}=...")
    return [f"{spelling}={value}"]
