"""The values that a recipe gives to parameters, and what they come to for one tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

Scalar: TypeAlias = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers: numbers are interpolated, anything else steps."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """A value for the tensors that ``filter`` selects: all when it is None or ``*``, else by substring."""

    value: Scalar | Gradient
    filter: str | None

    def matches(self, tensor_name: str) -> bool:
        """Return whether the condition holds for ``tensor_name``."""
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions in order of precedence: the first that matches a tensor gives its value."""

    conditions: tuple[Condition, ...]


Setting: TypeAlias = Scalar | Gradient | Conditions
Settings: TypeAlias = Mapping[str, Setting]

NO_SETTINGS: Final[Settings] = MappingProxyType({})


def evaluate(setting: Setting, tensor_name: str, t: float) -> Scalar | None:
    """Return the value of ``setting`` for a tensor at the layer position ``t`` (0 to 1).

    None means that no condition matches, so that the next level of the recipe decides.
    """
    if isinstance(setting, Conditions):
        for condition in setting.conditions:
            if condition.matches(tensor_name):
                return evaluate(condition.value, tensor_name, t)
        return None
    if isinstance(setting, Gradient):
        return _at(setting.values, t)
    return setting


def filters(setting: Setting) -> Iterator[str]:
    """Yield the filters of ``setting`` that select by name."""
    if isinstance(setting, Conditions):
        for condition in setting.conditions:
            if condition.filter is not None and condition.filter != "*":
                yield condition.filter


def longest_gradient(setting: Setting) -> int:
    """Return the number of values of the longest gradient in ``setting``, 0 where there is none."""
    if isinstance(setting, Conditions):
        return max((longest_gradient(condition.value) for condition in setting.conditions), default=0)
    return len(setting.values) if isinstance(setting, Gradient) else 0


def _at(values: tuple[Scalar, ...], t: float) -> Scalar | None:
    if not values:
        return None
    last = len(values) - 1
    position = t * last
    index = int(position)
    numbers = tuple(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
    if len(numbers) < len(values):
        return values[index]
    # Written out in this order because it rounds as mergekit does.
    fraction = position - index
    return (1 - fraction) * numbers[index] + fraction * numbers[min(last, index + 1)]
