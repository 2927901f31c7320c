"""What mergefs says when it refuses: one sentence with a remedy, and what mergekit does with the same recipe."""

import contextlib
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import mergekit_merge

from mergefs.cli import main

REMEDY = re.compile(
    r"[;:,] (?:(?:and|or|in a container|for example|so) )*"
    r"(add|change|check|choose|complete|convert|correct|delete|download|fold|free|give|install|leave|list|make|materialize"
    r"|mount|move|name|put|raise|remove|rename|repair|restore|run|set|stop|upgrade|use|wait|write|did you mean"
    r"|the known ones are|a condition has|\w+ takes"
    r"|`mergefs catalog check --repair` removes"
    r"|only models|everything in it can be rebuilt|the sources or the model changed)\b"
)


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and what it printed."""

    status: int
    stdout: str
    stderr: str


def said_by(*arguments: str | Path) -> Said:
    """Run a command of mergefs in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Said(status, out.getvalue(), err.getvalue())


def the_sentence(status: int, stdout: str, stderr: str, expected_status: int = 1) -> str:
    """Return the one sentence of a failed command."""
    assert (status, stdout) == (expected_status, ""), stderr
    assert stderr.startswith("mergefs: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    assert "internal error" not in stderr
    sentence = stderr.removeprefix("mergefs: error: ").strip()
    assert REMEDY.search(sentence), f"no remedy: {sentence}"
    return sentence


def refusal_of_plan(recipe: Path) -> str:
    """Return the one sentence by which ``mergefs plan`` refuses a recipe."""
    said = said_by("plan", recipe)
    return the_sentence(said.status, said.stdout, said.stderr)


def mergekit_refuses(document: Mapping[str, Any]) -> bool:
    """Return whether mergekit cannot merge a recipe, whatever the error is that it ends in."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        mergekit_merge(document)
    except Exception:
        return True
    finally:
        logging.disable(before)
    return False
