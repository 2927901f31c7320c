"""A ``mergefs mount`` of the fake tree: the real daemon, without recipes.

Usage: ``fake_server.py CONTROL MOUNTPOINT [--foreground] [--allow-other] [--log-file FILE] [--build HOW]``
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from fake_tree import FakeTree

from mergefs.errors import MergefsError, RecipeError, UsageError
from mergefs.mount.daemon import MountOptions, refuse_sources_inside, serve
from mergefs.mount.tree import Tree


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("control", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--build", default="succeed")
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()

    def build() -> Tree:
        control = arguments.control.absolute()
        (control / "building.new").write_text(str(os.getpid()))
        (control / "building.new").rename(control / "building")  # whole, once it is there
        if not arguments.foreground:
            print("building the tree", file=sys.stderr, flush=True)
        match arguments.build:
            case "refuse":
                raise RecipeError("ties.yml: line 3: unknown key 'wieght'; did you mean 'weight'?")
            case "refuse-usage":
                raise UsageError("these do not fit together")
            case "break":
                raise ZeroDivisionError("division by zero")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.exit(0)
            case "wait":
                while not (control / "build-on").exists():
                    time.sleep(0.005)
        if arguments.source:
            refuse_sources_inside(arguments.mountpoint, [arguments.source])
        return FakeTree(control)

    options = MountOptions(
        mountpoint=arguments.mountpoint,
        foreground=arguments.foreground,
        allow_other=arguments.allow_other,
        log_file=arguments.log_file,
        verbose=False,
    )
    try:
        serve(options, build)
    except MergefsError as error:
        print(f"mergefs: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
