"""Reads ``parameters`` tables, checked against what the method declares."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Final

from mergefs.errors import RecipeError
from mergefs.methods.contract import Parameter, Scope, Specification
from mergefs.methods.registry import built_in_methods_with
from mergefs.recipe import misplaced
from mergefs.recipe.conversion import to_bool, to_float
from mergefs.recipe.document import Entry, Item, Place, ScalarItem, SequenceItem, TableItem, describe, is_null
from mergefs.recipe.settings import NO_SETTINGS, Condition, Conditions, Gradient, Scalar, Setting, Settings
from mergefs.recipe.wording import listed, nearest, quote

_CONDITION_KEYS: Final = ("filter", "value")

# It stands in configs of every method, and never had to do with the result: only with the memory that mergekit takes.
_MASK_SIZE: Final = Parameter("int8_mask", "bool", Scope.GLOBAL, "bytes of a mask", default=False)


def read_settings(entry: Entry | None, method: Specification, model: str | None) -> Settings:
    """Return the settings of one ``parameters`` table, numbers and truth values converted.

    ``model`` names the model that the table belongs to, None the top level.
    Raises RecipeError, with its line, for a name that has no effect there and for a value that does not fit.
    """
    if entry is None:
        return NO_SETTINGS
    if not isinstance(entry.value, TableItem):
        raise entry.value.place.error(
            f"'parameters' must be a mapping of names to values, not {describe(entry.value)}; "
            "write for example `parameters: {weight: 0.5}`"
        )
    settings: dict[str, Setting] = {}
    for item in entry.value:
        parameter = method.parameter(item.key)
        if item.key == _MASK_SIZE.name and (parameter is None or model is not None):
            _SettingReader(_MASK_SIZE).setting(item)
            continue
        if parameter is None:
            raise item.place.error(_unknown_parameter(item.key, method))
        _check_scope(item, parameter, model)
        settings[parameter.name] = _SettingReader(parameter).setting(item)
    return MappingProxyType(settings)


def _unknown_parameter(name: str, method: Specification) -> str:
    known = [parameter.name for parameter in method.parameters]
    takes = f"{method.name} takes {listed(known)}"
    if name in misplaced.IN_PARAMETERS:
        return f"{name!r} cannot be used here: {misplaced.IN_PARAMETERS[name]}"
    others = built_in_methods_with(name)
    if others:
        return (
            f"{quote(name)} is a parameter of {listed(others[:3])}{', ...' if len(others) > 3 else ''}, but {takes}; "
            "remove it, since mergekit passes over it here, or change merge_method"
        )
    match = nearest(name, known)
    if match:
        return f"{quote(name)} is not a parameter of {method.name}; did you mean {match!r}?"
    return f"{quote(name)} is not a parameter of {method.name}; {takes}"


def _check_scope(item: Entry, parameter: Parameter, model: str | None) -> None:
    if model is None:
        return
    if parameter.scope is Scope.GLOBAL:
        raise item.place.error(
            f"{parameter.name!r} belongs to the whole merge and has no effect inside the entry of model "
            f"{quote(model)}; move it to the 'parameters' at top level"
        )


class _SettingReader:
    """Reads the value of one parameter in each of the forms that it may have."""

    def __init__(self, parameter: Parameter):
        self._parameter = parameter
        self._convert: Callable[[ScalarItem], Scalar] = self._bool if parameter.kind == "bool" else self._float

    def setting(self, entry: Entry) -> Setting:
        """Return a scalar, a gradient, or conditions."""
        item = entry.value
        if isinstance(item, TableItem):
            return Conditions((self._condition(item),))
        if isinstance(item, SequenceItem) and any(isinstance(element, TableItem) for element in item.items):
            return Conditions(tuple(self._condition(element) for element in item.items))
        return self._value(item, entry.place)

    def _condition(self, item: Item) -> Condition:
        name = self._parameter.name
        if not isinstance(item, TableItem):
            raise item.place.error(
                f"the list of {name!r} mixes conditions with {describe(item)}; write either values alone or "
                "conditions alone, as in `- value: 0.5` for all that no filter selects"
            )
        for entry in item:
            if entry.key not in _CONDITION_KEYS:
                match = nearest(entry.key, _CONDITION_KEYS)
                hint = f"did you mean {match!r}?" if match else "a condition has 'filter' and 'value'"
                raise entry.place.error(f"{quote(entry.key)} is not a key of a condition of {name!r}; {hint}")
        value = item.get("value")
        if value is None:
            raise item.place.error(f"a condition of {name!r} has no value; add `value:` to it")
        return Condition(self._value(value.value, value.place), self._filter(item.get("filter")))

    def _filter(self, entry: Entry | None) -> str | None:
        if entry is None:
            return None
        item = entry.value
        if not isinstance(item, ScalarItem) or not isinstance(item.value, str):
            raise item.place.error(
                f"a filter of {self._parameter.name!r} must be text that tensor names contain, such as self_attn, "
                f"not {describe(item)}; put it in quotes"
            )
        return item.value

    def _value(self, item: Item, place: Place) -> Scalar | Gradient:
        name = self._parameter.name
        if isinstance(item, SequenceItem):
            if not item.items:
                raise item.place.error(f"the list of {name!r} is empty; give at least one value, or remove the key")
            return Gradient(tuple(self._scalar(element) for element in item.items))
        if is_null(item):
            raise place.error(f"{name!r} has no value; give one, or remove the key")
        return self._scalar(item)

    def _scalar(self, item: Item) -> Scalar:
        if not isinstance(item, ScalarItem):
            raise item.place.error(
                f"a single value of {self._parameter.name!r} is expected here, not {describe(item)}; "
                "conditions and lists do not nest deeper than a list inside of one condition"
            )
        return self._convert(item)

    def _refuse(self, item: ScalarItem, wanted: str) -> RecipeError:
        return item.place.error(f"{self._parameter.name!r} must be {wanted}, not {describe(item)}; correct the value")

    def _bool(self, item: ScalarItem) -> bool:
        try:
            return to_bool(item.value)
        except ValueError:
            raise self._refuse(item, "true or false") from None

    def _float(self, item: ScalarItem) -> float:
        try:
            number = to_float(item.value)
        except ValueError:
            raise self._refuse(item, "a number") from None
        if not math.isfinite(number):
            raise self._refuse(item, "a finite number")
        if self._parameter.kind == "int" and not number.is_integer():
            raise self._refuse(item, "a whole number")
        low, high = self._parameter.minimum, self._parameter.maximum
        if (low is not None and number < low) or (high is not None and number > high):
            raise self._refuse(item, _range(low, high))
        return number


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    if high is None:
        return f"at least {low:g}"
    return f"between {low:g} and {high:g}"
