"""mergekit itself, run in this process: what a merge must equal.

Three things that mergekit leaves to chance or to the machine can be fixed, so that the rest can be compared bit by bit:
which of several equal magnitudes survives, which elements a random mask keeps, and how far long float32 sums are off.
"""

import contextlib
import importlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.merge_methods import (
    arcee_fusion,
    generalized_task_arithmetic,
    karcher,
    model_stock,
    nuslerp,
    sce,
    slerp,
)
from mergekit.merge_methods.base import FunctionalGroupMergeMethod
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge
from tensors import Tensors, load_model

from mergefs.kernels.random import UNIFORM_BITS, stream_key, uniform_integers

# The package has a function by the name of the module.
multislerp = importlib.import_module("mergekit.merge_methods.multislerp")


def mergekit_merge(document: Mapping[str, Any], **options: Any) -> Tensors:
    """Return what ``mergekit-yaml`` writes for the recipe ``document``; ``options`` are those of its command line."""
    configuration = MergeConfiguration.model_validate(dict(document))
    with tempfile.TemporaryDirectory() as directory, one_thread():
        settings = {"quiet": True, "write_model_card": False, "copy_tokenizer": False} | options
        run_merge(configuration, directory, MergeOptions(**settings))
        return load_model(Path(directory))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: with more, sums of more than 32,768 elements come out differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Put ``value`` in the place of an attribute for as long as the context lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _TorchBut:
    """The module torch (or what stands in its place) with some functions replaced, for a single module of mergekit."""

    def __init__(self, behind: Any = torch, **functions: Any) -> None:
        self._behind = behind
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return self._functions.get(name) or getattr(self._behind, name)


# Equal magnitudes


def _stable_argsort(values: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.argsort(values, **options, stable=True)


@dataclass(frozen=True)
class _Sorted:
    """The part of the result of ``torch.sort`` that mergekit uses."""

    indices: torch.Tensor


def _stable_sort(values: torch.Tensor, descending: bool) -> _Sorted:
    assert not descending
    return _Sorted(torch.argsort(values, descending=True, stable=True).flip(0))


@contextlib.contextmanager
def lowest_indices_first() -> Iterator[None]:
    """Let mergekit count the lowest flat indices as the largest among equal magnitudes: its sorts become stable."""
    with _replaced(sparsify, "torch", _TorchBut(argsort=_stable_argsort, sort=_stable_sort)):
        yield


# Sums of magnitudes


def _exactly_rescaled(tensor: torch.Tensor, mask: torch.Tensor, norm: Any, eps: float = 1e-7) -> torch.Tensor:
    masked = tensor * mask
    if norm is None:
        return masked
    before, after = (values.abs().double().sum().to(tensor.dtype) for values in (tensor, masked))
    return masked if before < eps or after < eps else masked * (before / after)


@contextlib.contextmanager
def exact_sums() -> Iterator[None]:
    """Let mergekit take sums of magnitudes in float64 and round them once, instead of in an order of torch's own."""
    with _replaced(sparsify, "rescaled_masked_tensor", _exactly_rescaled):
        yield


# Random masks


@dataclass
class _RandomMasks:
    """Draws mergekit's masks from our generator: it must know the tensor and the model that a mask is for."""

    seed: int
    tensor: str = ""
    models: list[int] = field(default_factory=list)
    model: int = 0
    density: float = 1.0

    def group(self, method: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        """Stand in for ``merge_group``, and remember which tensor is merged."""
        self.tensor = group.metadata.name
        self.models = [index for index, entry in enumerate(group.entries) if not entry.is_base]
        merged: torch.Tensor = _MERGE_GROUP(method, group, **parameters)
        assert self.models == []
        return merged

    def sparsify(self, tensor: torch.Tensor, density: float, **options: Any) -> torch.Tensor:
        """Stand in for ``sparsify``, which is called for each expert in turn, and remember for which."""
        self.model, self.density = self.models.pop(0), density
        sparse: torch.Tensor = sparsify.sparsify(tensor, density, **options)
        return sparse

    def bernoulli(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Stand in for ``torch.bernoulli``."""
        draws = uniform_integers(stream_key(self.seed, self.model, self.tensor), 0, probabilities.numel())
        uniform = torch.from_numpy(draws.astype(np.float64) / 2**UNIFORM_BITS).reshape(probabilities.shape)
        return (uniform < probabilities.double()).to(probabilities.dtype)

    def rescaled(self, tensor: torch.Tensor, mask: torch.Tensor, norm: Any) -> torch.Tensor:
        """Stand in for ``rescaled_masked_tensor``, with the factor of the paper."""
        masked = tensor * mask
        return (
            masked if norm is None or self.density <= 0 else masked * torch.tensor(1 / self.density, dtype=mask.dtype)
        )


_MERGE_GROUP = generalized_task_arithmetic.GeneralizedTaskArithmeticMerge.merge_group


@contextlib.contextmanager
def our_random_masks(seed: int = 0, exact_ratio: bool = False) -> Iterator[None]:
    """Let mergekit use our random masks, with its sorts stable.

    The factor of what is kept is 1/density in place of the ratio of sums, which estimates it; with ``exact_ratio`` it
    is that ratio, of sums that are taken in float64.
    """
    masks = _RandomMasks(seed)

    def merge_group(method: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        return masks.group(method, group, **parameters)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (generalized_task_arithmetic.GeneralizedTaskArithmeticMerge, "merge_group", merge_group),
            (generalized_task_arithmetic, "sparsify", masks.sparsify),
            (sparsify, "torch", _TorchBut(bernoulli=masks.bernoulli, argsort=_stable_argsort)),
            (sparsify, "rescaled_masked_tensor", _exactly_rescaled if exact_ratio else masks.rescaled),
        ):
            stack.enter_context(_replaced(owner, name, value))
        yield


# What is selected


@dataclass
class Selections:
    """Notes what mergekit selects: for each tensor one mask after the other, or single values that decide of all."""

    _tensor: str = ""
    _masks: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def enter(self, tensor: str) -> None:
        """Say which tensor is merged next."""
        self._tensor = tensor

    def note(self, mask: torch.Tensor) -> None:
        """Take a mask of the tensor that is merged, or a value that decides of the whole of it."""
        self._masks.setdefault(self._tensor, []).append(mask)

    def differing(self, other: "Selections", tensor: str) -> torch.Tensor | None:
        """Return of which elements of a tensor ``other`` decides otherwise, or None where nothing was decided."""
        ours, theirs = self._masks.get(tensor, []), other._masks.get(tensor, [])
        if len(ours) != len(theirs):
            return torch.tensor(True)
        found = [first != second for first, second in zip(ours, theirs, strict=True)]
        return torch.stack(found).any(dim=0) if found else None


@contextlib.contextmanager
def selections_noted() -> Iterator[Selections]:
    """Let mergekit merge as it does, and note what it selects: by density, variance or importance.

    For karcher in float16, where cosines near 1 have steps of 0.0005, the cosines are noted: they decide on angles.
    """
    noted = Selections()

    def merge_group(method: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        noted.enter(group.metadata.name)
        merged: torch.Tensor = before[type(method)](method, group, **parameters)
        return merged

    def noting(function: Callable[..., Any], mask_of: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
        def noted_call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            noted.note(mask_of(result))
            return result

        return noted_call

    def dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch_of_karcher.dot(first, second)
        if found.dtype == torch.float16:
            noted.note(found)
        return found

    torch_of_karcher = karcher.torch
    pruning = generalized_task_arithmetic.GeneralizedTaskArithmeticMerge
    before = {kind: kind.merge_group for kind in (pruning, FunctionalGroupMergeMethod)}
    fusion = arcee_fusion.DynamicThresholdFusion
    with (
        _replaced(pruning, "merge_group", merge_group),
        _replaced(FunctionalGroupMergeMethod, "merge_group", merge_group),
        _replaced(
            generalized_task_arithmetic,
            "sparsify",
            noting(generalized_task_arithmetic.sparsify, lambda pruned: pruned != 0),
        ),
        _replaced(karcher, "torch", _TorchBut(torch_of_karcher, dot=dot)),
        _replaced(sce, "sce_mask", noting(sce.sce_mask, torch.Tensor.bool)),
        _replaced(fusion, "compute_fusion_mask", noting(fusion.compute_fusion_mask, lambda found: found[0].bool())),
    ):
        yield noted


# The angle of slerp


@dataclass
class _ExactAngles:
    """Puts the angle into slerp that a float64 inner product gives, with mergekit's own norms.

    Where the two are parallel, slerp asks for no angle.
    """

    cosines: list[float] = field(default_factory=list)

    def slerp(self, t: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Stand in for ``slerp``, and take the cosines of its pairs."""
        self.cosines = [_cosine_with_their_norms(a, b) for a, b in zip(first, second, strict=True)]
        merged: torch.Tensor = _SLERP(t, first, second)
        return merged

    def acos(self, cosines: torch.Tensor) -> torch.Tensor:
        """Stand in for ``torch.acos``."""
        kind = cosines.dtype
        exact = torch.tensor(self.cosines, dtype=torch.float64).to(kind).reshape(cosines.shape)
        return torch.where(cosines == 0, cosines, exact).double().acos().to(kind)


_SLERP = slerp.slerp


def _rounded(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``function`` taken in float64 and rounded: torch's own depend on the CPU in their last bit."""
    return lambda values: function(values.double()).to(values.dtype)


def _cosine_with_their_norms(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the cosine from a float64 inner product and the float32 norms of norms of chunks that mergekit takes."""
    pair = [values.flatten().to(torch.promote_types(values.dtype, torch.float32)) for values in (first, second)]
    norms = []
    for values in pair:
        parts = [torch.linalg.vector_norm(part) for part in values.split(slerp._CHUNK_ELEMENTS)]
        norms.append(torch.linalg.vector_norm(torch.stack(parts)).item())
    length = math.prod(norm if norm > 1e-8 else 1.0 for norm in norms)
    return float((pair[0].double() * pair[1].double()).sum()) / length


@contextlib.contextmanager
def exact_angles() -> Iterator[None]:
    """Let mergekit's slerp use a float64 inner product instead of a float32 sum in an order that threads decide on.

    Its sines are rounded from float64, too: torch's own depend on the CPU in their last bit.
    """
    angles = _ExactAngles()
    with (
        _replaced(slerp, "slerp", angles.slerp),
        _replaced(slerp, "torch", _TorchBut(acos=angles.acos, sin=_rounded(torch.sin))),
    ):
        yield


# The angles of model_stock


def _settled_norm(values: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return torch's norm where its order is settled, else an exact one, rounded.

    In bfloat16 and float32 torch adds in one order on all CPUs with vectors and with any number of threads, and for
    strided vectors in any dtype. In float16 the number of threads decides, in float64 the order makes no difference.
    """
    if values.dtype in (torch.bfloat16, torch.float32) or (
        values.dtype == torch.float16 and not values.is_contiguous()
    ):
        return torch.norm(values, **options)
    return values.double().norm(**options).to(values.dtype)


_SUM = torch.Tensor.sum
_MEAN = torch.Tensor.mean


def _exact_sum(values: torch.Tensor, **options: Any) -> torch.Tensor:
    return _SUM(values.double(), **options).to(values.dtype)


def _settled_sum(values: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return torch's sum on one thread in float32, else an exact one, rounded.

    Sums over columns that lie apart in memory, which torch adds up in yet another order, are exact.
    """
    if values.dtype != torch.float32 or not values.is_contiguous():
        return _exact_sum(values, **options)
    with one_thread():
        return _SUM(values, **options)


def _settled_mean(values: torch.Tensor, **options: Any) -> torch.Tensor:
    return _MEAN(values, **options) if values.dtype == torch.float32 else _exact_mean(values, **options)


def _exact_mean(values: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.mean(values.double(), **options).to(values.dtype)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Let mergekit's model_stock take inner products and means in float64 and round them once, but for float32."""
    with (
        _replaced(model_stock, "torch", _TorchBut(norm=_settled_norm)),
        _replaced(torch.Tensor, "sum", _settled_sum),
        _replaced(torch.Tensor, "mean", _settled_mean),
    ):
        yield


# Directions: nuslerp, multislerp, karcher


def _settled_row_sum(values: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """Settle sums over whole tensors, which keep the dimension; those over models are as they are."""
    return _settled_sum(values, dim=-1, keepdim=True) if options else _SUM(values, *arguments)


def _exact_dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.double() * second.double()).sum().to(first.dtype)


@contextlib.contextmanager
def exact_directions() -> Iterator[None]:
    """Let mergekit take inner products of directions in float64 and round them once, and sines and such.

    In float32 inner products are torch's own on one thread, but for those of karcher.
    """
    functions = {name: _rounded(getattr(torch, name)) for name in ("sin", "cos", "acos", "arccos")}
    by_norm = _TorchBut(norm=_settled_norm, sum=_settled_sum, **functions)
    by_vector_norm = _TorchBut(dot=_exact_dot, **functions)
    with (
        _replaced(nuslerp, "torch", by_norm),
        _replaced(multislerp, "torch", by_norm),
        _replaced(torch.Tensor, "sum", _settled_row_sum),
        _replaced(karcher, "torch", by_vector_norm),
    ):
        yield


# The selection of sce


def _stable_topk(values: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    assert largest
    order = torch.argsort(values, descending=True, stable=True)[:k]
    return values[order], order


@contextlib.contextmanager
def exact_energies() -> Iterator[None]:
    """Let mergekit's sce take means in float64 and round them once; of equal variances the first are selected."""
    with _replaced(sce, "torch", _TorchBut(topk=_stable_topk)), _replaced(torch.Tensor, "mean", _exact_mean):
        yield


# The importance of arcee_fusion


def _exact_softmax(values: torch.Tensor, dim: int) -> torch.Tensor:
    single = values if values.dtype == torch.float64 else values.float()
    powers = (single - single.amax(dim, keepdim=True)).double().exp().to(single.dtype)
    return (powers / _exact_sum(powers, dim=dim, keepdim=True)).to(values.dtype)


@contextlib.contextmanager
def exact_importance() -> Iterator[None]:
    """Let mergekit's arcee_fusion take exponentials, logarithms and sums in float64 and round them once.

    Quartiles are those of all elements, where mergekit draws a million of them at random.
    """
    with (
        _replaced(arcee_fusion, "F", SimpleNamespace(softmax=_exact_softmax)),
        _replaced(arcee_fusion, "torch", _TorchBut(log=_rounded(torch.log), sum=_exact_sum)),
        _replaced(arcee_fusion, "_QUANTILE_SAMPLE_SIZE", math.inf),
    ):
        yield


@contextlib.contextmanager
def nothing_left_to_chance(method: str, seed: int = 0) -> Iterator[None]:
    """Fix everything of ``method`` that mergekit leaves open."""
    with contextlib.ExitStack() as stack:
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            stack.enter_context(lowest_indices_first())
            stack.enter_context(exact_sums())
        elif method.startswith("dare_"):
            stack.enter_context(our_random_masks(seed))
        elif method in ("della", "della_linear"):
            stack.enter_context(our_random_masks(seed, exact_ratio=True))
        elif method == "model_stock":
            stack.enter_context(exact_products())
        elif method == "slerp":
            stack.enter_context(exact_angles())
        elif method in ("nuslerp", "multislerp", "karcher"):
            stack.enter_context(exact_directions())
        elif method == "sce":
            stack.enter_context(exact_energies())
        elif method == "arcee_fusion":
            stack.enter_context(exact_importance())
        yield


def mergekit_multi(documents: Sequence[Mapping[str, Any]]) -> Tensors:
    """Return what ``mergekit-multi`` writes as the result of several documents, of which one has no name."""
    text = yaml.safe_dump_all([dict(document) for document in documents])
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=True)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        configurations, dependencies = multimerge.load_config(text, str(place / "inner"))
        tasks = multimerge.make_tasks(
            configurations, dependencies, options, str(place / "inner"), str(place / "out"), lazy=False
        )
        Executor(tasks, math_device="cpu", storage_device="cpu").execute()
        return load_model(place / "out")
