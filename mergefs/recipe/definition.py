"""What a recipe says, read and checked: an immutable value without a file behind it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mergefs.checkpoint.dtypes import DType
from mergefs.recipe.references import ModelReference
from mergefs.recipe.settings import NO_SETTINGS, Settings
from mergefs.recipe.tokenizer import TokenizerSettings


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model that takes part in a merge, with the settings of its own entry.

    ``layers`` are the first layer that is taken of it and the one after the last; None takes the whole model.
    """

    model: ModelReference
    parameters: Settings
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """A run of layers of the merged model, and what they are merged from.

    ``sources`` as they are listed; ``base`` is the slice's own, else the recipe's.
    """

    sources: tuple[ModelInput, ...]
    base: ModelReference | None
    parameters: Settings

    @property
    def whole(self) -> bool:
        """Whether whole models are merged, and not ranges of their layers."""
        return all(source.layers is None for source in self.sources)

    def inputs(self) -> tuple[ModelInput, ...]:
        """Return the models that take part: those listed, then a base of whole models that is not among them."""
        if self.base is None or not self.whole or any(entry.model == self.base for entry in self.sources):
            return self.sources
        return (*self.sources, ModelInput(self.base, NO_SETTINGS))


@dataclass(frozen=True, slots=True)
class OutputModule:
    """A part of the merged model, such as ``vision_tower``; ``name`` is None for the whole of it."""

    name: str | None
    slices: tuple[OutputSlice, ...]
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge and how.

    ``text`` is the file verbatim, ``origin`` its path (or ``<recipe>``), ``directories`` those that relative paths
    count from, the first before the others: the one that was current when the recipe was read, that of the path, and
    where a symbolic link stands there also that of the file itself.
    ``inner`` are the recipes of the same file whose results this one merges, by the names that it calls them by.
    ``tokenizer`` is None where the donor's tokenizer stays as it is, and so is ``chat_template``.
    """

    method: str
    modules: tuple[OutputModule, ...]
    base: ModelReference | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: Settings
    text: str
    origin: str
    directories: tuple[Path, ...]
    name: str | None = None
    inner: Mapping[str, "Recipe"] = field(default_factory=lambda: MappingProxyType({}))
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None

    @property
    def slices(self) -> tuple[OutputSlice, ...]:
        """The slices of all modules."""
        return tuple(part for module in self.modules for part in module.slices)

    @property
    def models(self) -> tuple[ModelInput, ...]:
        """The entries of all slices as they are listed."""
        return tuple(source for part in self.slices for source in part.sources)

    def inputs(self) -> tuple[ModelInput, ...]:
        """Return the models of all slices, each with its first entry, and the base where it takes part unlisted."""
        found: dict[ModelReference, ModelInput] = {}
        for part in self.slices:
            for entry in part.inputs():
                found.setdefault(entry.model, entry)
        return tuple(found.values())

    @property
    def bases(self) -> frozenset[ModelReference]:
        """Every model that is the base of a slice."""
        return frozenset(part.base for part in self.slices if part.base is not None)

    def settings(self) -> Iterator[Settings]:
        """Yield the tables of parameters of every level, the innermost first."""
        for module in self.modules:
            for part in module.slices:
                yield from (source.parameters for source in part.sources)
                yield part.parameters
            yield module.parameters
        yield self.parameters
