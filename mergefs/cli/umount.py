"""``mergefs umount``."""

from pathlib import Path

import click


@click.command(name="umount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Take it away at once, and end the server when its last reader is done.")
def command(mountpoint: Path, lazy: bool) -> None:
    """Take the mount at MOUNTPOINT away, and wait until its server has ended.

    A crashed mount is cleared. A busy one stays, and the processes that hold it are named.
    """
    from mergefs.mount.unmount import unmount

    unmount(mountpoint, lazy=lazy)
