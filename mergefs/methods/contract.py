"""What a merge method declares.

A method is one declaration: its parameters, what it asks of its inputs, the statistics of whole tensors that it
needs, how those become a handful of coefficients for each tensor, and an elementwise kernel.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.rounding import Analysis, Form, Rounding

LONGEST_ROW: Final = 4 * 2**20
"""Rows up to this many elements are never cut, so that a method may work by rows."""


class Scope(Enum):
    """Whom a parameter belongs to."""

    GLOBAL = "global"
    PER_MODEL = "per model"
    PER_EXPERT = "per expert"  # each model but the base


class BasePolicy(Enum):
    """What a method does with ``base_model``."""

    REQUIRED = "required"
    AS_INPUT = "as one more input"  # the base takes part like any other model
    OPTIONAL = "optional"


class FewModels(Enum):
    """What a method does with a tensor that only some of the models have, where they are too few for it to merge."""

    REFUSED = "refused"
    TAKE_ONE = "the only model that has the tensor gives it"
    TAKE_BASE = "the base gives the tensor where it alone has it"
    FALL_BACK_ON_BASE = "the base gives the tensor"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    ``default`` is None where ``required`` is set, and where leaving it out has a meaning of its own. ``minimum`` and
    ``maximum`` are inclusive.
    """

    name: str
    kind: Literal["float", "int", "bool"]
    scope: Scope
    meaning: str
    required: bool = False
    default: float | bool | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Specification:
    """The part of a method that recipes are checked against.

    ``min_models`` and ``max_models`` count the distinct models of a recipe, the base among them; ``min_experts`` and
    ``max_experts`` those that are not the base. ``needs`` says in words which statistics the method asks for, and when;
    it is empty where it asks for none.
    """

    name: str
    title: str
    reference: str
    summary: str
    parameters: tuple[Parameter, ...]
    base: BasePolicy
    min_models: int = 1
    max_models: int | None = None
    min_experts: int = 0
    max_experts: int | None = None
    few_models: FewModels = FewModels.REFUSED
    needs: str = ""

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter called ``name``, or None."""
        return next((p for p in self.parameters if p.name == name), None)


@dataclass(frozen=True, slots=True)
class MagnitudeThreshold:
    """Asks for the threshold that keeps the ``keep`` largest magnitudes of one model's delta, over a whole tensor.

    ``model`` is an index into the inputs of the merge. The answer is a ``Threshold``.
    """

    model: int
    keep: int


@dataclass(frozen=True, slots=True)
class MagnitudeRescale:
    """Asks for sum|delta| / sum|delta kept| of one model's tensor.

    Kept are the ``keep`` largest magnitudes without the ``beyond`` largest. The answer is a float (float64 sums), 1.0
    where either sum is below 1e-7.
    """

    model: int
    keep: int
    beyond: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """The same run of elements of every input, for a reference kernel.

    ``inputs`` are one-dimensional arrays of values of the compute dtype, carried as float32 (float64 when the merge
    computes in F64). ``start`` is the flat index of the first element in the tensor.
    """

    inputs: tuple[Array, ...]
    start: int


Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RawRun:
    """The same run of elements of every input, for a fused kernel: bytes of the compute dtype, each in one piece.

    ``start`` is the flat index of the first element in the tensor. The result may lie in ``into``, bytes of that dtype
    and as many; who returns memory of its own has it copied there.
    """

    inputs: tuple[Raw, ...]
    dtype: DType
    start: int
    into: Raw | None = None


@dataclass(frozen=True, slots=True)
class Moments:
    """What the terms of a quantity are, as simple as norms and inner products need them.

    Its inputs, less the last of them, a base, where they are ``based``, and divided by ``lengths`` where there are
    some, each result rounded to the compute dtype. These are the terms themselves; or, with ``pairs`` of them, the
    products of each pair: rounded, too, or ``exact`` in float64.
    """

    based: bool = False
    lengths: tuple[float, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number for each element of a tensor, or for each row, that follows from the same elements of some inputs.

    ``name`` and ``arguments`` say which number, and are what answers about it are kept under: ``terms`` must depend on
    nothing else but a block of whole rows of the inputs ``models``, in that order. ``fused``, where there is one, gives
    the same bits by compiled kernels, for the compute dtypes that have them. Where ``moments`` says what the terms are,
    they are computed and added up in one compiled pass. ``lanes``, where there is one, adds the terms of a block up
    from its bytes: a row of 128 float64 for each sum in float64, as ``mergefs.kernels.sums.LaneSums`` has them.
    """

    name: str
    models: tuple[int, ...]
    terms: Callable[[Block, Precision], Array] = field(compare=False, repr=False)
    arguments: tuple[float, ...] = ()
    fused: Callable[[Block, Precision], Array] | None = field(default=None, compare=False, repr=False, kw_only=True)
    moments: "Moments | None" = field(default=None, compare=False, repr=False, kw_only=True)
    lanes: "Callable[[RawRun], Vector] | None" = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Put one and the same NaN into the arguments: others equal nothing, so the answer would never be found."""
        arguments = tuple(math.nan if math.isnan(argument) else argument for argument in self.arguments)
        object.__setattr__(self, "arguments", arguments)


@dataclass(frozen=True, slots=True)
class ElementSum(Quantity):
    """Asks for the sum, in float64, of a quantity over all elements of a tensor. The answer is a float."""


@dataclass(frozen=True, slots=True)
class ElementSums(Quantity):
    """Asks for the sums, in float64, of ``count`` quantities that are computed together.

    Their terms are an array with a row for each of them. The answer is a ``Vector`` of ``count`` sums.
    """

    count: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class SingleSums(Quantity):
    """Asks for the sums of ``count`` quantities of F32, added up in float32 in torch's order on one thread.

    Their terms are an array with a row for each of them. The answer is a ``Vector`` of ``count`` sums.
    """

    count: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class ElementNorms(Quantity):
    """Asks for the Euclidean norms of ``count`` quantities, added up in float32 in torch's order.

    Their terms are an array with a row for each of them, values of the compute dtype, or with ``widened`` of F32. With
    ``chunk``, a multiple of 16, they are the norms of the norms of so many elements each. The answer is a ``Vector`` of
    ``count`` norms.
    """

    count: int = field(kw_only=True)
    widened: bool = field(kw_only=True, default=False)
    chunk: int | None = field(kw_only=True, default=None)


@dataclass(frozen=True, slots=True)
class ElementThreshold(Quantity):
    """Asks for the threshold that keeps the ``keep`` largest values of a quantity of the compute dtype.

    The answer is a ``Threshold``, whose keys are ``Precision.order_keys`` of the quantity.
    """

    keep: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class ElementQuantile(Quantity):
    """Asks for the value of a quantity of the compute dtype that ``rank`` other elements come before in rising order.

    Where values are equal, any of them may come first; NaN comes last. The answer is a float.
    """

    rank: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class RowValues(Quantity):
    """Asks for a quantity that has one value for each row of ``row`` elements. The answer is a ``Vector``."""

    row: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class ColumnSums(Quantity):
    """Asks for the sums of a quantity over all elements whose flat indices are equal modulo ``columns``.

    They are added up from the first to the last, in float64, or with ``single`` in float32. The answer is a ``Vector``
    of ``columns`` sums.
    """

    columns: int = field(kw_only=True)
    single: bool = field(kw_only=True, default=False)


Statistic = (
    MagnitudeThreshold
    | MagnitudeRescale
    | ElementSum
    | ElementSums
    | SingleSums
    | ElementNorms
    | ElementThreshold
    | ElementQuantile
    | RowValues
    | ColumnSums
)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Which elements survive: those with keys above ``key``, and those equal to it at flat indices below ``cut``.

    A key is an unsigned integer that orders as the values do. For magnitudes it is their bit pattern: of the 16 bit
    float where the merge computes in BF16 or F16, of the float32 otherwise. ``cut`` is the element count of the tensor
    where all that are equal to ``key`` survive.
    """

    key: int
    cut: int

    def keeps(self, keys: NDArray[np.unsignedinteger[Any]], start: int) -> NDArray[np.bool_]:
        """Return which of a run of elements survive, from their keys and the flat index of the first."""
        places = np.arange(start, start + keys.size, dtype=np.int64)
        survives: NDArray[np.bool_] = (keys > self.key) | ((keys == self.key) & (places < self.cut))
        return survives


Answer = Threshold | float | Vector


@dataclass(frozen=True, slots=True)
class Answers:
    """The statistics that a method asked for."""

    values: Mapping[Statistic, Answer]

    def __contains__(self, statistic: Statistic) -> bool:
        return statistic in self.values

    def threshold(self, model: int, keep: int) -> Threshold:
        """Return the answer to ``MagnitudeThreshold``."""
        return self.limit(MagnitudeThreshold(model, keep))

    def limit(self, statistic: MagnitudeThreshold | ElementThreshold) -> Threshold:
        """Return the answer to a statistic that is a threshold."""
        answer = self.values[statistic]
        if not isinstance(answer, Threshold):
            raise TypeError(f"a threshold was asked for and {answer!r} was answered")
        return answer

    def number(self, statistic: MagnitudeRescale | ElementSum | ElementQuantile) -> float:
        """Return the answer to a statistic that is a number."""
        answer = self.values[statistic]
        if not isinstance(answer, float):
            raise TypeError(f"a number was asked for and {answer!r} was answered")
        return answer

    def vector(self, statistic: ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums) -> Vector:
        """Return the answer to a statistic that is several numbers."""
        answer = self.values[statistic]
        if not isinstance(answer, np.ndarray):
            raise TypeError(f"a vector was asked for and {answer!r} was answered")
        return answer


NO_ANSWERS = Answers({})


@dataclass(frozen=True, slots=True)
class TensorContext:
    """What a method may know of a tensor without its bytes.

    ``size`` counts elements, ``row`` those of a row (the last dimension), ``columns`` those that one
    step along the first dimension passes, and ``models`` the inputs; ``base`` is the index of the base among these, or
    None. ``shared`` and ``per_model`` are the resolved parameters, of the tensor and
    of each input.
    """

    name: str
    size: int
    row: int
    columns: int
    compute: DType
    base: int | None
    models: int
    shared: Mapping[str, float | bool | None]
    per_model: tuple[Mapping[str, float | bool | None], ...]
    seed: int

    @property
    def experts(self) -> tuple[int, ...]:
        """Indices of the inputs that are not the base, in the order of the recipe."""
        return tuple(index for index in range(self.models) if index != self.base)

    def number(self, name: str, model: int | None = None) -> float:
        """Return the parameter ``name``, shared or of one model, as a float."""
        value = (self.shared if model is None else self.per_model[model])[name]
        if value is None:
            raise KeyError(name)
        return float(value)


@dataclass(frozen=True, slots=True)
class Response:
    """How a merged tensor answers to its inputs: ``(1 + offset) * base + sum(factor_i * delta_i)``, elementwise.

    A delta is an input minus the base, or minus what stands in for one; tuples have a number for each input, and that
    of the base is 0. ``factors`` are expected over the elements, ``spreads`` are their variances over these (of
    a random mask, which keeps some and rescales them).

    ``largest`` bounds the factors' magnitudes for certain: leaving a delta out changes an element by at most
    ``largest * |delta|`` in exact arithmetic, whatever the others are; None where no number does, as when signs are
    elected. ``fixed`` says that factors do not depend on the deltas at all: the merge is linear in them, so that one
    which is known but approximately changes an element by at most ``largest`` times the error. ``offset`` is exact
    where ``fixed`` or ``largest`` say so, and the error of a block that is left to the base altogether.

    ``rounding`` says how far the computed merge can be from the exact one. Without it nothing is certain.
    """

    factors: tuple[float, ...]
    spreads: tuple[float, ...]
    largest: tuple[float, ...] | None = None
    fixed: bool = False
    offset: float = 0.0
    rounding: Rounding | None = None

    @classmethod
    def estimated(cls, factors: Sequence[float], spreads: Sequence[float] | None = None) -> "Response":
        """Return the response of a merge that follows no known numbers; those that are not finite count as 0."""
        usual = tuple(factor if math.isfinite(factor) else 0.0 for factor in factors)
        varied = (0.0,) * len(usual) if spreads is None else tuple(s if math.isfinite(s) else 0.0 for s in spreads)
        return cls(usual, varied)

    @classmethod
    def known(cls, factors: Sequence[float], offset: float = 0.0) -> "Response":
        """Return the response of a merge that is linear with these factors; where one is not finite, an estimate."""
        if not all(map(math.isfinite, (*factors, offset))):
            return cls.estimated(factors)
        return cls(tuple(factors), (0.0,) * len(factors), tuple(map(abs, factors)), fixed=True, offset=offset)

    @classmethod
    def linear(cls, analysis: Analysis, result: Form) -> "Response":
        """Return the response of a merge that is the linear ``result``, as ``analysis`` followed it."""
        offset = float(result.factors[-1]) - 1.0
        rounding = analysis.rounding(result, offset)
        factors = tuple(map(float, result.factors[:-1]))
        if rounding is None:
            return cls.estimated(factors)
        return cls(
            factors=factors,
            spreads=(0.0,) * len(factors),
            largest=tuple(map(abs, factors)),
            fixed=True,
            offset=offset,
            rounding=rounding,
        )


CoefficientsT = TypeVar("CoefficientsT")


class Method(ABC, Generic[CoefficientsT]):
    """A merge method: statistics of whole tensors, coefficients, and an elementwise kernel."""

    specification: Specification

    def check(self, context: TensorContext) -> None:
        """Raise RecipeError where the parameters of this tensor make no sense together."""

    def remarks(self, context: TensorContext) -> tuple[str, ...]:
        """Return what a user should know of the parameters of this tensor: clauses that follow its name and a colon."""
        return ()

    def taken_as_it_is(self, context: TensorContext) -> int | None:
        """Return the input whose values are the result, whatever they are; None, as for most, where it is computed.

        Its bytes are then copied, and the kernel is not asked.
        """
        return None

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """Return what has to be known about the whole tensor; nothing, for methods that look at elements alone."""
        return ()

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """Return what has to be known beside ``answers``, where a pass over the tensor needs results of the one before.

        Asked again with what it wanted, until it wants nothing more.
        """
        return ()

    @abstractmethod
    def coefficients(self, context: TensorContext, answers: Answers) -> CoefficientsT:
        """Turn the answers to ``statistics`` into what the kernel needs, once for each tensor."""

    def grain(self, coefficients: CoefficientsT) -> int:
        """Return how many elements a kernel must see at once: a row for methods that work by rows, else 1."""
        return 1

    def result_dtype(self, compute: DType) -> DType:
        """Return the dtype of what ``reference`` returns: the compute dtype, but for methods that end in F32."""
        return compute

    @abstractmethod
    def reference(self, block: Block, coefficients: CoefficientsT, precision: Precision) -> Array:
        """Compute the block by the formula: the definition that a fast kernel must equal bit for bit.

        Returns values of ``result_dtype``, carried as in ``Block``.
        """

    def kernels(self) -> tuple[str, ...]:
        """Return the modules that the method computes with, each with one ``KERNEL``.

        A name without a dot is a module of ``mergefs.kernels.fused``, any other is absolute.
        """
        return ()

    def fused(self, run: RawRun, coefficients: CoefficientsT) -> Raw | None:
        """Compute the run from bytes to bytes of its dtype, or return None where only ``reference`` can.

        The result equals the reference's, rounded to that dtype, bit for bit, but for the payload of NaN. Where
        ``result_dtype`` is another one it is not asked for anything else.
        """
        return None

    @abstractmethod
    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Return how the result answers to the inputs, for the planner, as far as the answers to ``statistics`` say.

        Every number is finite. Raises nothing, whatever the statistics are.
        """
