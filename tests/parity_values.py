"""The values that the parity matrix gives to a parameter, from nothing but its declaration.

Every parameter is left out where it may be, and takes the ends of its range, ordinary values, a gradient over the
layers, conditions by filter, and conditions that hold gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergefs.methods.contract import Parameter, Scope

# All families of the matrix have tensors with these words in their names, and others.
ATTENTION, FEED_FORWARD = "self_attn", "mlp"


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to set a parameter in a recipe: at its top level, and in the entries of its models.

    ``per_model`` holds what the first models say, in their order; None says nothing.
    """

    shared: Any = None
    per_model: tuple[Any, ...] = ()

    def write(self, name: str, document: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        """Set the parameter ``name`` in a recipe, of whose models ``entries`` are those that it can belong to."""
        if self.shared is not None:
            document.setdefault("parameters", {})[name] = self.shared
        for entry, value in zip(entries, self.per_model, strict=False):
            if value is not None:
                entry.setdefault("parameters", {})[name] = value


@dataclass(frozen=True, slots=True)
class Values:
    """Values of one parameter: two ordinary ones for the layers of gradients, and ``single`` ones by their names."""

    ordinary: tuple[Any, Any]
    single: Mapping[str, Any]

    def forms(self) -> dict[str, Any]:
        """Return the settings that one place of a recipe may hold, by their names."""
        first, second = self.ordinary
        return {
            **self.single,
            "a gradient": [first, second],
            "a filter": [{"filter": ATTENTION, "value": second}, {"value": first}],
            "filters and gradients": [
                {"filter": FEED_FORWARD, "value": [second, first]},
                {"filter": "*", "value": first},
            ],
        }


def _numbers(parameter: Parameter) -> Values:
    low, high = parameter.minimum, parameter.maximum
    default = None if parameter.default is None else float(parameter.default)
    if default is not None and default != 0 and default not in (low, high):
        ordinary = [2 * default, default / 2]
    else:
        start, end = 0.0 if low is None else low, 1.0 if high is None else high
        ordinary = [start + share * (end - start) for share in (0.6, 0.4)]
    if high is not None:
        ordinary = [min(value, high) for value in ordinary]
    single = {"ordinary": ordinary[0], "the lowest": 0.0 if low is None else low}
    if high is not None or default is None:
        single["the highest"] = 1.0 if high is None else high
    if low is None and high is None and default is None:
        single["a negative"] = -0.1
    if high is None and default is not None:
        single["a hundredth"] = 0.01
    # Leaving a parameter out is its default.
    return Values((ordinary[0], ordinary[1]), {name: value for name, value in single.items() if value != default})


def _whole_numbers(parameter: Parameter) -> Values:
    """Halves of gradients over an odd number of layers must be whole numbers too."""
    low, high = parameter.minimum, parameter.maximum
    start = int(low or 0)
    last = start + 8 if high is None else int(high)
    return Values((start + 2, start + 4), {"ordinary": start + 2, "the lowest": start, "the highest": last})


def _truth_values(parameter: Parameter) -> Values:
    return Values((not parameter.default, bool(parameter.default)), {"true": True, "false": False})


_KINDS: dict[str, Callable[[Parameter], Values]] = {"float": _numbers, "int": _whole_numbers, "bool": _truth_values}


def values(parameter: Parameter) -> Values:
    """Return values for a parameter; KeyError for a kind that is not thought of here."""
    return _KINDS[parameter.kind](parameter)


def choices(parameter: Parameter) -> dict[str, Choice]:
    """Return the ways to set a parameter, by their names."""
    first, second = values(parameter).ordinary
    forms = values(parameter).forms()
    found = {} if parameter.required else {"left out": Choice()}
    if parameter.scope is Scope.GLOBAL:
        return found | {name: Choice(form) for name, form in forms.items()}
    found |= {
        "for all models": Choice(first),
        "of each its own": Choice(per_model=(first, second, first, second, first)),
    }
    return found | {f"{name} for one": Choice(second, (form,)) for name, form in forms.items() if name != "ordinary"}
