"""``mergefs status``."""

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergefs.errors import MountError
from mergefs.units import format_duration, format_size

if TYPE_CHECKING:
    from mergefs.mount.mountinfo import MountEntry


@click.command(name="status")
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object for each mount.")
def command(mountpoint: Path | None, as_json: bool) -> None:
    """Show the mounts of this machine, or the one at MOUNTPOINT: what they have read, cached and served."""
    reports = [_report(entry) for entry in _select(mountpoint)]
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    elif not reports:
        click.echo("Nothing is mounted.")
    else:
        _print_for_people(reports)


def _select(mountpoint: Path | None) -> tuple["MountEntry", ...]:
    """Return the mounts to report on. Raises MountError when ``mountpoint`` is none of them."""
    from mergefs.mount.mountinfo import FILESYSTEM, find_mount, list_mounts

    if mountpoint is None:
        return list_mounts()
    entry = find_mount(mountpoint)
    if entry is None:
        raise MountError(f"{mountpoint} is not a mount point; `mergefs status` without one lists all mounts")
    if entry.filesystem != FILESYSTEM:
        raise MountError(f"{mountpoint} is a mount of type {entry.filesystem}, not of mergefs")
    return (entry,)


def _report(entry: "MountEntry") -> dict[str, Any]:
    """Return the status object of one mount; ``state`` is ``live``, ``crashed``, ``stuck`` or ``unreadable``."""
    from mergefs.mount.mountinfo import state
    from mergefs.mount.unmount import read_status

    found = state(entry)
    report: dict[str, Any] = {"mountpoint": str(entry.mountpoint), "state": found}
    if found == "crashed":
        return report | {"error": f"its server is gone; run `mergefs umount {entry.mountpoint}` to clear it"}
    silent = {"state": "stuck", "error": "its server does not answer; its log may say why"}
    if found == "stuck":
        return report | silent
    try:
        # The mount point is the one seen here: a server in another mount namespace may know another.
        return report | read_status(entry) | report
    except TimeoutError:
        return report | silent
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return report | {"state": "unreadable", "error": "another user mounted it for themselves"}
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
    except ValueError as error:
        reason = str(error)
    return report | {"state": "unreadable", "error": f"its status cannot be read: {reason}"}


def _print_for_people(reports: list[dict[str, Any]]) -> None:
    """Print a table of the mounts that answer, and a line for each of the others."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 400  # nobody's window: fold nothing, so that lines can be searched
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Mount")
    table.add_column("Recipes")
    for title in ("Experts read", "Base read", "Analysis read", "Served", "Cache", "Hits", "Up", "PID"):
        table.add_column(title, justify="right", no_wrap=True)
    others = []
    for report in reports:
        if report["state"] == "live":
            table.add_row(*(escape(cell) for cell in _cells(report)))
        else:
            others.append(f"{report['mountpoint']}: {report['state']}; {report['error']}")
    if table.row_count:
        console.print(table)
    for line in others:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(report: dict[str, Any]) -> list[str]:
    """Return one row of the table."""
    hits, misses = report.get("cache_hits"), report.get("cache_misses")
    asked = (hits or 0) + (misses or 0)
    return [
        str(report["mountpoint"]),
        ", ".join(Path(str(recipe)).name for recipe in report.get("recipes", [])),
        *(
            _size(report.get(key))
            for key in ("expert_bytes_read", "base_bytes_read", "analysis_bytes_read", "bytes_served", "cache_bytes")
        ),
        f"{100 * (hits or 0) / asked:.0f} %" if asked else "-",
        _duration(report.get("uptime_s")),
        str(report.get("pid", "-")),
    ]


def _size(value: object) -> str:
    """Return a number of bytes for people, or a dash when it is not known."""
    return format_size(value) if isinstance(value, int | float) else "-"


def _duration(seconds: object) -> str:
    """Return a duration for people, or a dash when it is not known."""
    return format_duration(seconds) if isinstance(seconds, int | float) else "-"
