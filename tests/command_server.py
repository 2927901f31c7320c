"""Runs commands of mergefs in processes that are forked from this one, which has imported and compiled everything.

A command then begins at once, and can be traced from its first system call. Each line of stdin is a JSON object with
the ``arguments``, the ``environment`` that changes, and the file that the command's ``output`` goes to. The answer is
the process's id; it waits until another line comes, and its exit status is printed when it has ended (negative: the
signal that killed it). The command of the first line is run by this process itself, for what it loads.
"""

import contextlib
import json
import os
import sys
from typing import Any

from mergefs.cli import main
from mergefs.materialize import durability, weights


def run(request: dict[str, Any]) -> int:
    """Run one command in this process, and return its exit status."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ |= request["environment"]
    return main(request["arguments"])


def run_child(request: dict[str, Any], gate: int) -> None:
    """Run one command in a forked process, once the gate opens."""
    os.read(gate, 1)
    status = 70
    try:
        status = run(request)
    finally:
        os._exit(status)


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(run(json.loads(sys.stdin.readline())), file=answers)
    # A model of a few pieces then is many steps: each is written, synced and told to the journal on its own.
    weights.CHUNK = durability.SYNC_BYTES = 2**20  # type: ignore[misc]
    for line in sys.stdin:
        gate, opener = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            run_child(json.loads(line), gate)
        os.close(gate)
        print(pid, file=answers)
        sys.stdin.readline()
        with contextlib.suppress(BrokenPipeError):  # killed before it began
            os.write(opener, b"g")
        os.close(opener)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


if __name__ == "__main__":
    serve()
