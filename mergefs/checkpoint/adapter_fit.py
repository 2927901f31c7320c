"""Which tensors of a model an adapter changes, and how: decided by names and shapes alone.

Everything in the adapter must find its place; what PEFT passes over in silence is an error here.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

from mergefs.checkpoint.adapter import Adapter, Factors
from mergefs.checkpoint.adapter_names import OUTPUT_EMBEDDINGS, Outline, Spelling, find_spelling, find_tensor
from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.errors import CheckpointError, UnsupportedCheckpointError

Shape = tuple[int, ...]

# Models whose projections are Conv1D of transformers, which holds a weight as (inputs, outputs).
_TRANSPOSED_LINEAR: Final = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
# Models whose stacks of experts are (experts, inputs, outputs), and known to be so to PEFT; only square ones need it.
_TRANSPOSED_EXPERTS: Final = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
# The order in which transformers registers the parameters of experts, and PEFT wraps them from the inside out.
_PARAMETER_ORDER: Final = ("gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")

_MOST_PERMUTED: Final = 5

_EXPERT: Final = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds ``scaling * sum over k of b[o, k, e] * a[e, k, i]`` at output o and input i of matrix e of a tensor.

    ``a`` is read as ``stack`` matrices of ``rank`` rows each, below each other; in ``b`` those of the stack alternate
    from column to column. The tensor holds (outputs, inputs) or, with ``inputs_first``, (inputs, outputs), one for each
    member of the stack; where it has more dimensions (a convolution), they all belong to the inputs. With
    ``rounds_delta`` the product is rounded to the dtype of the tensor before it is added. ``magnitude`` gives each row
    of the sum a new length (DoRA, https://arxiv.org/abs/2402.09353).
    """

    a: TensorSource
    b: TensorSource
    stack: int
    rank: int
    inputs_first: bool
    scaling: float
    rounds_delta: bool
    magnitude: TensorSource | None = None

    @property
    def inputs(self) -> int:
        """The number of inputs; those of a convolution are all elements of its kernel for one output."""
        return math.prod(self.a.shape[1:])

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return self.b.shape[0]

    @property
    def rows(self) -> int:
        """The rows of one matrix of the tensor."""
        return self.inputs if self.inputs_first else self.outputs

    @property
    def columns(self) -> int:
        """The elements of a row."""
        return self.outputs if self.inputs_first else self.inputs


@dataclass(frozen=True, slots=True)
class AddedVector:
    """Adds ``scaling * vector`` to a bias."""

    vector: TensorSource
    scaling: float


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Takes the place of a whole tensor, in the dtype of that."""

    tensor: TensorSource


@dataclass(frozen=True, slots=True)
class SavedRows:
    """Takes the place of the rows ``indices`` of a tensor, in the dtype of that."""

    rows: TensorSource
    indices: tuple[int, ...]


Change = LowRank | AddedVector | SavedTensor | SavedRows


@dataclass(frozen=True, slots=True)
class Fit:
    """What an adapter does to the tensors of a model: ``changes``, in order, by name.

    ``untied`` is the output embedding that the model gets beside the input embedding that it was tied to, because the
    adapter was trained with the two apart: its name, and that of the tensor of the model that its changes start from.
    """

    changes: Mapping[str, tuple[Change, ...]]
    untied: tuple[str, str] | None = None


def fit_adapter(adapter: Adapter, model: Outline) -> Fit:
    """Return which changes ``adapter`` makes to which tensors of ``model``.

    Raises CheckpointError naming the module where something of the adapter has no place in the model or another
    shape, UnsupportedCheckpointError for what cannot be computed row by row.
    """
    return _Fitter(adapter, model, find_spelling(adapter, model)).fit()


@dataclass(frozen=True, slots=True)
class _Fitter:
    """Finds the place of each part of an adapter, whose modules ``spell`` names as the files of the model do."""

    adapter: Adapter
    model: Outline
    spell: Spelling

    def fit(self) -> Fit:
        """Return all changes, for each tensor in the order in which PEFT makes them."""
        untied = self._untied()
        changes: defaultdict[str, list[Change]] = defaultdict(list)
        for name, tensor in self.adapter.saved.items():
            target = self._target(name, untied)
            self._require_shape(tensor, target, self._shape(target), name)
            # Of an input and an output embedding that stay tied, the output one is loaded last.
            changes[target] = [SavedTensor(tensor)]
        for target, change in self._factor_changes(untied):
            changes[target].append(change)
        for module, rows in self.adapter.tokens.items():
            changes[self._target(f"{module}.weight", None)].append(self._saved_rows(module, rows))
        tied_to = self.model.input_embedding
        return Fit(
            {target: tuple(made) for target, made in changes.items()},
            (untied, tied_to) if untied is not None and tied_to is not None else None,
        )

    def _target(self, name: str, untied: str | None) -> str:
        """Return the tensor of the model, or the one that untying gives it, that the adapter calls ``name``."""
        spelled = self.spell(name)
        found = spelled if spelled == untied else find_tensor(spelled, self.model)
        if found is None:
            raise CheckpointError(
                f"{self.adapter.path} changes {name!r}, which {self.model.name} has no tensor for; apply the adapter "
                "to the model that it was trained on"
            )
        return found

    def _shape(self, target: str) -> Shape:
        """Return the shape of a tensor; an untied output embedding has that of the input embedding."""
        return self.model.shapes.get(target) or self.model.shapes[self.model.input_embedding or target]

    def _untied(self) -> str | None:
        """Return the output embedding that is no longer the input embedding, because the adapter was trained so.

        PEFT copies a module of ``modules_to_save`` before it trains it, which ends the tie unless it is told not to.
        """
        if not self.model.ties_embeddings or self.adapter.config.keeps_ties or self.model.input_embedding is None:
            return None
        outputs = [name for name in self.adapter.saved if name.endswith(OUTPUT_EMBEDDINGS)]
        for name in self.adapter.saved:
            is_embedding = self.spell(name) == self.model.input_embedding or name in outputs
            if is_embedding and self.adapter.config.is_saved(name.rpartition(".")[0]):
                if outputs:
                    output = self.spell(outputs[0])
                else:
                    output = "embed_out.weight" if name.endswith("embed_in.weight") else "lm_head.weight"
                return None if output in self.model.shapes else output
        return None

    def _factor_changes(self, untied: str | None) -> list[tuple[str, Change]]:
        """Return the changes that factors make, those of embeddings before those of what is tied to them."""
        found: list[tuple[str, Change]] = []
        by_module: defaultdict[str, list[Factors]] = defaultdict(list)
        for factors in self.adapter.factors:
            by_module[factors.module].append(factors)
        for module, nested in sorted(by_module.items(), key=lambda item: not item[1][0].embedding):
            parameters = self._parameters(module)
            if parameters:
                found += self._parameter_changes(module, nested, parameters)
                continue
            if len(nested) > 1:
                raise CheckpointError(
                    f"{self.adapter.path} has several factors for module {module!r}, but target_parameters of "
                    f"{self.adapter.config.path.name} names no parameters of it; save the adapter again with PEFT"
                )
            found += self._module_changes(nested[0], untied)
        return found

    def _module_changes(self, factors: Factors, untied: str | None) -> list[tuple[str, Change]]:
        """Return what the factors of a module do to its weight, and to its bias."""
        config, module = self.adapter.config, factors.module
        target = self._target(f"{module}.weight", untied)
        self._require_rank(factors, module, 1)
        inputs_first = self._inputs_first(factors, target)
        scaling = config.scaling_of(module)
        change = LowRank(
            a=factors.a,
            b=factors.b,
            stack=1,
            rank=factors.a.shape[0],
            inputs_first=inputs_first,
            scaling=scaling,
            rounds_delta=factors.embedding or config.minor or self._is_of_experts(module),
            magnitude=self._magnitude(factors, inputs_first),
        )
        changes: list[tuple[str, Change]] = [(target, change)]
        if factors.bias is not None:
            bias = self._target(f"{module}.bias", None)
            self._require_shape(factors.bias, bias, self._shape(bias), module)
            changes.append((bias, AddedVector(factors.bias, scaling)))
        return changes

    def _is_of_experts(self, module: str) -> bool:
        """Return whether transformers holds the weight in a stack of experts, or is that of their router.

        Since version 5 it stacks those that lie apart in files, and PEFT treats them, and their router, as parameters.
        """
        parent, _, leaf = module.rpartition(".")
        beside = self.spell(f"{parent}.experts.")
        return _EXPERT.search(module) is not None or (
            leaf == "gate" and any(name.startswith(beside) for name in self.model.shapes)
        )

    def _inputs_first(self, factors: Factors, target: str) -> bool:
        """Return whether the weight is (inputs, outputs); both factors must fit it."""
        shape, a, b = self._shape(target), factors.a.shape, factors.b.shape
        if factors.embedding:
            if shape == (a[1], b[0]):
                return True
            resized = f" (it was trained with {a[1]} tokens, and the model has {shape[0]})" if a[1] != shape[0] else ""
            raise self._misfit(factors, target, f"{resized}; resize the embeddings of the model, or take the right one")
        outputs_first = shape == (b[0], *a[1:]) and set(b[2:]) <= {1}
        transposed = len(shape) == 2 and shape == (a[1], *b[:1])
        if outputs_first and transposed:
            return self.adapter.config.fan_in_fan_out or self.model.model_type in _TRANSPOSED_LINEAR
        if not outputs_first and not transposed:
            raise self._misfit(factors, target, "; apply the adapter to the model that it was trained on")
        return transposed

    def _misfit(self, factors: Factors, target: str, remedy: str) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter.path}: the factors of module {factors.module!r} are {list(factors.a.shape)} and "
            f"{list(factors.b.shape)}, which do not fit tensor {target!r} of {self.model.name}, "
            f"{list(self._shape(target))}{remedy}"
        )

    def _magnitude(self, factors: Factors, inputs_first: bool) -> TensorSource | None:
        """Return the lengths of DoRA, which can be set row by row only where rows are outputs."""
        if (factors.magnitude is not None) != self.adapter.config.weight_decomposed:
            raise CheckpointError(
                f"{self.adapter.path}: module {factors.module!r} "
                f"{'has no' if factors.magnitude is None else 'has a'} magnitude vector, which contradicts use_dora in "
                f"{self.adapter.config.path.name}; save the adapter again with PEFT"
            )
        if factors.magnitude is not None and (inputs_first or len(factors.a.shape) > 2):
            kind = "an embedding" if factors.embedding else "a Conv1D" if inputs_first else "a convolution"
            raise UnsupportedCheckpointError(
                f"{self.adapter.path}: module {factors.module!r} is {kind} adapted by DoRA, whose lengths do not go "
                "along the rows of its weight, so no row can be computed alone; fold the adapter into its model with "
                "PEFT's merge_and_unload() and save_pretrained(), and name the result"
            )
        return factors.magnitude

    def _saved_rows(self, module: str, rows: TensorSource) -> SavedRows:
        """Return the rows of an embedding that the adapter replaces."""
        indices = self.adapter.config.tokens_of(module)
        shape = self._shape(self._target(f"{module}.weight", None))
        if indices is None or rows.shape != (len(indices), *shape[1:]) or len(shape) != 2:
            raise CheckpointError(
                f"{self.adapter.path}: tensor {rows.name!r} is {list(rows.shape)}, which does not fit the "
                f"{'missing ' if indices is None else f'{len(indices)} '}trainable_token_indices of module {module!r} "
                f"and its weight, {list(shape)}; apply the adapter to the model that it was trained on"
            )
        if max(indices, default=0) >= shape[0]:
            raise CheckpointError(
                f"{self.adapter.path} replaces token {max(indices)} of module {module!r}, and the model has "
                f"{shape[0]}; resize the embeddings of the model, or take the one that the adapter was trained on"
            )
        return SavedRows(rows, indices)

    def _require_rank(self, factors: Factors, pattern_name: str, stack: int) -> None:
        """Refuse factors of another rank than the configuration says: the scaling would be wrong, too."""
        rank = self.adapter.config.rank_of(pattern_name)
        if factors.a.shape[0] != rank * stack:
            raise CheckpointError(
                f"{self.adapter.path}: the factors of module {factors.module!r} have rank "
                f"{factors.a.shape[0] / stack:g}, and {self.adapter.config.path.name} says {rank}; "
                "save the adapter again with PEFT"
            )

    def _require_shape(self, tensor: TensorSource, target: str, shape: Shape, name: str) -> None:
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.adapter.path}: tensor {tensor.name!r} is {list(tensor.shape)}, and {target!r} of "
                f"{self.model.name} is {list(shape)}; apply the adapter to the model that it was trained on, with a "
                "vocabulary of the same size"
            )

    def _parameters(self, module: str) -> list[str]:
        """Return the tensors of ``module`` that target_parameters names, in the order in which PEFT wraps them."""
        targets = self.adapter.config.target_parameters
        if not targets:
            return []
        prefix = self.spell(f"{module}.")
        found = [
            name
            for name, shape in self.model.shapes.items()
            if name.startswith(prefix)
            and "." not in name.removeprefix(prefix)
            and len(shape) > 1
            and any(f".{name}".endswith(f".{target}") for target in targets)
        ]
        order = {name: position for position, name in enumerate(_PARAMETER_ORDER)}
        return sorted(found, key=lambda name: (order.get(name.removeprefix(prefix), len(order)), name))

    def _parameter_changes(
        self, module: str, nested: Sequence[Factors], parameters: Sequence[str]
    ) -> list[tuple[str, Change]]:
        """Return what nested factors do to the parameters of one module, the innermost of them to the first."""
        inside_out = sorted(nested, key=lambda factors: -factors.depth)
        fitting: list[list[tuple[str, Change]]] = []
        for order in _orders(parameters) if len(parameters) == len(inside_out) else ():
            made = [self._stacked(factors, target) for factors, target in zip(inside_out, order, strict=True)]
            if all(change is not None for change in made):
                fitting.append([(t, change) for t, change in zip(order, made, strict=True) if change is not None])
        if not fitting:
            raise CheckpointError(
                f"{self.adapter.path}: the factors of module {module!r} do not fit its parameters "
                f"{', '.join(repr(name) for name in parameters)} in {self.model.name}; apply the adapter to the model "
                "that it was trained on"
            )
        return fitting[0]

    def _stacked(self, factors: Factors, target: str) -> LowRank | None:
        """Return what factors do to a parameter, or None where they do not fit it."""
        shape, a, b = self._shape(target), factors.a.shape, factors.b.shape
        stack = shape[0] if len(shape) == 3 else 1
        if factors.embedding or len(shape) > 3 or len(a) != 2 or a[0] % stack:
            return None
        outputs_first = shape[-2:] == (b[0], a[1])
        transposed = stack > 1 and shape[-2:] == (a[1], b[0])
        if not outputs_first and not transposed:
            return None
        inputs_first = transposed and (not outputs_first or self.model.model_type in _TRANSPOSED_EXPERTS)
        name = f"{factors.module}.{target.rpartition('.')[2]}"
        self._require_rank(factors, name, stack)
        return LowRank(
            factors.a, factors.b, stack, a[0] // stack, inputs_first, self.adapter.config.scaling_of(name), True
        )


def _orders(parameters: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Yield the orders in which parameters may have been wrapped, the usual one first, and for many only that."""
    return permutations(parameters) if len(parameters) <= _MOST_PERMUTED else (tuple(parameters),)
