"""One tensor of one merge, in memory: the inputs, and what a method is told of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.errors import RecipeError
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.methods.contract import BasePolicy, Block, Method, Parameter, Scope, Specification, TensorContext
from mergefs.testing.choices import Choices

Value = float | bool | None

DTYPES: Final = (BF16, F16, F32, F64)
_SHAPES: Final = ((13,), (5, 7), (2, 33), (64,), (16, 4), (3, 2, 8), (1,), (), (0,), (4, 0))
_NAMES: Final = ("model.layers.0.mlp.up_proj.weight", "model.layers.11.self_attn.q_proj.weight", "lm_head.weight")
_MOST_MODELS: Final = 5
_SPECIAL: Final = (0.0, -0.0, 1e-45, 6e-8, 6.1e-5, 1.0, -1.0, 65504.0, -1e30, 3.4e38, math.inf, -math.inf, math.nan)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A tensor of every input, and its context. ``raws`` are read-only bytes of the compute dtype."""

    context: TensorContext
    shape: tuple[int, ...]
    raws: tuple[Raw, ...]
    kinds: tuple[str, ...]

    @property
    def precision(self) -> Precision:
        """The arithmetic of the merge."""
        return Precision(self.context.compute)

    def values(self, start: int = 0, stop: int | None = None, models: tuple[int, ...] | None = None) -> Block:
        """Return a run of elements of every input, or of some, as a reference kernel sees it; read-only."""
        compute = self.context.compute
        itemsize = compute.itemsize
        stop = self.context.size if stop is None else stop
        chosen = self.raws if models is None else tuple(self.raws[model] for model in models)
        runs = []
        for raw in chosen:
            run = load(raw[start * itemsize : stop * itemsize], compute, compute)
            run.flags.writeable = False
            runs.append(run)
        return Block(tuple(runs), start)

    def describe(self) -> str:
        """Say what the case is, for who has to repair the method."""
        context = self.context
        inputs = ", ".join(
            f"{'base' if model == context.base else 'model'} of {kind}" for model, kind in enumerate(self.kinds)
        )
        settings = [dict(context.shared), *map(dict, context.per_model)]
        return (
            f"a tensor {context.name!r} of shape {list(self.shape)} in {context.compute.name}, from {inputs}, with "
            f"parameters {settings}, seed {context.seed}"
        )


def make_case(method: Method[Any], choices: Choices, finite: bool = False) -> Case:
    """Return a case that a recipe could lead to, of any kind of data, or of finite numbers of everyday size."""
    specification = method.specification
    shape = choices.pick(_SHAPES)
    with_base = specification.base is BasePolicy.REQUIRED or choices.pick((True, False))
    models = _number_of_models(specification, choices, with_base)
    base = choices.integer(0, models - 1) if with_base else None
    compute = choices.pick(DTYPES)
    kinds = tuple(choices.pick(_FINITE_KINDS if finite else _KINDS) for _ in range(models))
    context = _context(specification, choices, shape, compute, base, models)
    generator = np.random.default_rng(choices.integer(0, 2**32 - 1))
    raws: list[Raw] = []
    for kind in kinds:
        raw = _KINDS_OF_DATA[kind](generator, context.size, compute, raws[0] if raws else None)
        raw.flags.writeable = False
        raws.append(raw)
    require_possible(method, context, choices)
    return Case(context, shape, tuple(raws), kinds)


def _number_of_models(specification: Specification, choices: Choices, with_base: bool) -> int:
    """Return a number of models that a recipe may have, the base among them where there is one."""
    low = max(specification.min_models, specification.min_experts + with_base)
    bounds = (specification.max_models, specification.max_experts and specification.max_experts + with_base)
    high = min(bound for bound in (*bounds, max(_MOST_MODELS, low)) if bound is not None)
    return low if low > high else choices.integer(low, high)


def vary(method: Method[Any], case: Case, choices: Choices) -> Case:
    """Return the same inputs under other parameters, another name or another seed."""
    before = case.context
    context = _context(method.specification, choices, case.shape, before.compute, before.base, before.models)
    require_possible(method, context, choices)
    return Case(context, case.shape, case.raws, case.kinds)


def require_possible(method: Method[Any], context: TensorContext, choices: Choices) -> None:
    """Reject a case whose parameters the method refuses."""
    try:
        method.check(context)
    except RecipeError:
        choices.reject()


def _context(
    specification: Specification,
    choices: Choices,
    shape: tuple[int, ...],
    compute: DType,
    base: int | None,
    models: int,
) -> TensorContext:
    def chosen(*scopes: Scope) -> Mapping[str, Value]:
        return {p.name: value_of(p, choices) for p in specification.parameters if p.scope in scopes}

    per_model = tuple(
        chosen(Scope.PER_MODEL) if model == base else chosen(Scope.PER_MODEL, Scope.PER_EXPERT)
        for model in range(models)
    )
    return TensorContext(
        name=choices.pick(_NAMES),
        size=math.prod(shape),
        row=max(1, shape[-1] if shape else 1),
        columns=max(1, math.prod(shape[1:])),
        compute=compute,
        base=base,
        models=models,
        shared=chosen(Scope.GLOBAL),
        per_model=per_model,
        seed=choices.pick((0, 1, -1, 2**63)),
    )


def value_of(parameter: Parameter, choices: Choices) -> Value:
    """Return a value that a recipe may give a parameter, or leave it at: an edge, the default, or one between."""
    options: list[Value] = [] if parameter.required else [parameter.default]
    if parameter.kind == "bool":
        return choices.pick([*options, False, True])
    low, high = parameter.minimum, parameter.maximum
    if parameter.kind == "int":
        start = 0 if low is None else int(low)
        return choices.pick([*options, start, choices.integer(start, start + 3 if high is None else int(high))])
    if choices.pick((True, False)):
        return choices.number(-1.0 if low is None else low, 2.0 + (low or 0.0) if high is None else high)
    options += [bound for bound in (low, high) if bound is not None]
    options += [0.0, 1.0] if low is None and high is None else []
    return choices.pick(options or [1.0])


def _rounded(values: NDArray[Any], compute: DType) -> Raw:
    with np.errstate(all="ignore"):
        carried: Array = values.astype(Precision(compute).carrier)
        return store(Precision(compute).round(carried), compute, compute)


def _weights(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return _rounded(generator.standard_normal(size) * 0.05, compute)


def _fine_tuned(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    """Return the first input with small changes of four elements in five."""
    if first is None:
        return _weights(generator, size, compute, first)
    changes = generator.standard_normal(size) * 0.01 * (generator.random(size) < 0.8)
    with np.errstate(all="ignore"):
        return _rounded(load(first, compute, compute) + changes, compute)


def _ties(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return _rounded(generator.integers(-2, 3, size) * 2.0**-6, compute)


def _zeros(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return _rounded(np.zeros(size), compute)


def _same(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return _weights(generator, size, compute, first) if first is None else first.copy()


def _special(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return _rounded(generator.choice(_SPECIAL, size), compute)


def _any_bits(generator: np.random.Generator, size: int, compute: DType, first: Raw | None) -> Raw:
    return generator.integers(0, 256, size * compute.itemsize, dtype=np.uint8)


_FINITE_KINDS: Final = ("weights", "weights fine-tuned from the first", "few values", "zeros", "the first again")
_KINDS_OF_DATA: Final = {
    "weights": _weights,
    "weights fine-tuned from the first": _fine_tuned,
    "few values": _ties,
    "zeros": _zeros,
    "the first again": _same,
    "NaN, infinity, denormals and zeros": _special,
    "any bits": _any_bits,
}
_KINDS: Final = tuple(_KINDS_OF_DATA)
