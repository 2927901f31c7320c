"""What a plan is worth: how far the merge that mergefs serves is from the whole one, and how well it predicts text."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budget_study.families import TrainedFamily
from mergefs.api import MergedModel
from mergefs.demo.evaluation import perplexity
from mergefs.evaluation.imports import import_transformers

Tensors = Mapping[str, NDArray[np.float32]]

_EVALUATION_WINDOWS = 32  # of each domain
_EVALUATION_BATCH = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one plan: the relative error of its merge, the perplexity for each domain, and expert bytes.

    The error is the norm of what differs from the whole merge by the norm of what that adds to the base, over all
    tensors. ``planned`` are the bytes that the plan meant to read, ``read`` those that were read. ``perplexities`` are
    empty where they were not wanted.
    """

    error: float
    perplexities: tuple[float, ...]
    planned: int
    read: int


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What merges of one recipe are held against: the base, and the merge that reads everything."""

    base: Tensors
    whole: Tensors

    @property
    def delta_norm(self) -> float:
        """The norm of what the whole merge adds to the base."""
        return distance(self.whole, self.base)


def served_tensors(model: MergedModel) -> dict[str, NDArray[np.float32]]:
    """Return every tensor of a merge as float32."""
    return {name: model.get_tensor(name).float().numpy() for name in model.keys()}  # noqa: SIM118


def stored_tensors(directory: Path) -> dict[str, NDArray[np.float32]]:
    """Return every tensor of a model directory as float32."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor.float().numpy() for file in files for name, tensor in load_file(file).items()}


def distance(first: Tensors, second: Tensors) -> float:
    """Return the norm of the difference of two models."""
    squares = (
        np.square(values.astype(np.float64) - second[name].astype(np.float64)).sum() for name, values in first.items()
    )
    return math.sqrt(sum(squares))


def measure(model: MergedModel, yardstick: Yardstick, family: TrainedFamily | None) -> Measured:
    """Read a merge once, as ``mergefs.open`` serves it, and measure it: its perplexities on the text of ``family``."""
    before = model.bytes_read  # planning may have read, too
    error = distance(served_tensors(model), yardstick.whole) / yardstick.delta_norm
    perplexities = () if family is None else perplexities_of_served(model, family)
    read = {name: size - before[name] for name, size in model.bytes_read.items()}
    if read["analysis_bytes_read"] or read["expert_bytes_reread"]:
        raise RuntimeError(f"reading the merge read more than its blocks once: {read}")
    return Measured(error, perplexities, model.plan.outcome.expert_bytes_planned, read["expert_bytes_read"])


def perplexities_of_served(model: MergedModel, family: TrainedFamily) -> tuple[float, ...]:
    """Return the held-out perplexity on each domain of a merge, loaded by transformers from its files."""
    directory = Path(tempfile.mkdtemp(prefix="mergefs-study-"))
    try:
        for name in model.files.sizes:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(model.read_file(name))
        return perplexities_of(directory, family)
    finally:
        shutil.rmtree(directory)


def perplexities_of(directory: Path, family: TrainedFamily) -> tuple[float, ...]:
    """Return the held-out perplexity on each domain of a model in a directory."""
    loaded: Any = import_transformers().AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    context = family.kind.options.context
    limit = _EVALUATION_WINDOWS * (context + 1)
    return tuple(
        perplexity(loaded, domain.held_out, context=context, batch=_EVALUATION_BATCH, limit_bytes=limit)
        for domain in family.domains
    )


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))
