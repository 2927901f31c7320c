"""Packages that register merge methods, written and put on the path as an installer would."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from mergefs.methods import plugins

MEAN: Final = """
import numpy as np

from mergefs.methods.contract import BasePolicy, Method, Response, Specification


class Mean(Method[int]):
    specification = Specification(
        name="mean",
        title="Mean",
        reference="https://example.org/mean",
        summary="The mean of the models.",
        parameters=(),
        base=BasePolicy.AS_INPUT,
    )

    def coefficients(self, context, answers):
        return context.models

    def reference(self, block, coefficients, precision):
        return precision.round(np.sum(block.inputs, axis=0, dtype=precision.carrier) / precision.carrier(coefficients))

    def response(self, context, answers):
        return Response.known([0.0 if model == context.base else 1 / context.models for model in range(context.models)])


METHOD = Mean()
"""
"""The source of a small method that works."""


def install(
    directory: Path,
    source: str = MEAN,
    *,
    distribution: str = "example-merge",
    version: str = "1.0",
    entry_points: Mapping[str, str] | None = None,
) -> Path:
    """Write a package of one module, with the metadata that an installer writes, and return ``directory``.

    The module is called as the distribution is, with underscores. ``entry_points`` maps names of methods to what they
    refer to, by default ``mean`` to the module's ``METHOD``.
    """
    module = distribution.replace("-", "_")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{module}.py").write_text(source)
    information = directory / f"{module}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in (entry_points or {"mean": f"{module}:METHOD"}).items()]
    (information / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines]) + "\n")
    return directory


def use(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """Put directories of packages on the path of this process for the rest of a test, first those named first."""
    for directory in reversed(directories):
        monkeypatch.syspath_prepend(directory)
        for module in directory.glob("*.py"):
            monkeypatch.delitem(sys.modules, module.stem, raising=False)
    plugins._load.cache_clear()
