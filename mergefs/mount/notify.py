"""Telling a service manager that the mount is there (the sd_notify protocol)."""

import contextlib
import os
import socket


def notify(message: str) -> None:
    """Send ``message``, such as ``READY=1``, to the service manager that $NOTIFY_SOCKET names; nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A manager that has gone away is no reason to stop serving.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(message.encode(), address)
