"""Runs one command and writes what it took as JSON; a process of its own, started as ``python -I -S launcher.py``.

The kernel counts in a process's peak memory that of the process which started it, so what starts a measured command
must be small: this imports nothing but what every Python has loaded.
"""

import json
import os
import sys
import time


def main() -> int:
    """Run what the JSON argument names: ``command``, ``report``, ``processors`` and ``groups`` to be in."""
    asked = json.loads(sys.argv[1])
    for group in asked["groups"]:
        with open(group, "w") as file:  # noqa: PTH123 (pathlib takes memory)
            file.write(str(os.getpid()))
    if asked["processors"]:
        os.sched_setaffinity(0, asked["processors"])
    command = asked["command"]
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    taken = {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    with open(asked["report"], "w") as file:  # noqa: PTH123
        json.dump(taken, file)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
