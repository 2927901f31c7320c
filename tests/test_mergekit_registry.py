"""Every method of mergekit 0.1.5 is there, with its parameters, and is declared as it is declared there."""

from typing import Any

import pytest
from mergekit.merge_methods import get, registered_methods
from mergekit.merge_methods.base import BasePolicy as TheirBase
from mergekit.merge_methods.base import OptionalTensorPolicy, ParameterScope

from mergefs.methods.contract import BasePolicy, FewModels, Scope
from mergefs.methods.registry import METHODS

BASES = {
    TheirBase.REQUIRED: BasePolicy.REQUIRED,
    TheirBase.OPTIONAL: BasePolicy.OPTIONAL,
    TheirBase.IGNORED: BasePolicy.AS_INPUT,
}
MISSING = {
    OptionalTensorPolicy.ERROR: FewModels.REFUSED,
    OptionalTensorPolicy.PASSTHROUGH_SINGLETON: FewModels.TAKE_ONE,
    OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON: FewModels.TAKE_BASE,
    OptionalTensorPolicy.BASE_OR_SKIP: FewModels.FALL_BACK_ON_BASE,
}
SCOPES = {
    ParameterScope.SHARED: Scope.GLOBAL,
    ParameterScope.INPUT: Scope.PER_MODEL,
    ParameterScope.NON_BASE: Scope.PER_EXPERT,
}
KINDS = {"bool": bool, "int": int, "float": float}
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def test_the_methods_are_those_of_mergekit() -> None:
    assert sorted(METHODS) == sorted(method.spec.name for method in registered_methods())
    assert len(METHODS) == 20


@EVERY_METHOD
def test_a_method_takes_the_parameters_that_it_takes_in_mergekit(name: str) -> None:
    theirs = {parameter.name: parameter for parameter in get(name).spec.parameters}
    ours = {parameter.name: parameter for parameter in METHODS[name].specification.parameters}
    assert ours.keys() == theirs.keys()
    for parameter in ours.values():
        other = theirs[parameter.name]
        assert parameter.scope is SCOPES[other.scope], parameter.name
        assert parameter.required == other.required, parameter.name
        assert other.required or parameter.default == other.default, parameter.name
        assert KINDS[parameter.kind] in (other.value_type, *getattr(other.value_type, "__args__", ())), parameter.name


@EVERY_METHOD
def test_a_method_takes_the_models_that_it_takes_in_mergekit(name: str) -> None:
    spec, specified = get(name).spec, METHODS[name].specification
    assert specified.base is BASES[spec.contract.base]
    assert specified.few_models is MISSING[spec.optional_tensor_policy]
    based = spec.contract.base is TheirBase.REQUIRED

    def accepted(takes: Any, experts: int, base: bool) -> bool:
        try:
            takes(["base"] * base + list(range(experts)), "base" if base else None)
        except ValueError:
            return False
        return True

    def take(models: list[Any], base: Any) -> None:
        experts = len(models) - (base is not None)
        for number, low, high in (
            (len(models), specified.min_models, specified.max_models),
            (experts, specified.min_experts, specified.max_experts),
        ):
            if number < low or (high is not None and number > high):
                raise ValueError(number)

    for base in (True,) if based else (True, False):
        for experts in range(5):
            if experts + base:
                assert accepted(take, experts, base) == accepted(spec.contract.validate_ids, experts, base)
