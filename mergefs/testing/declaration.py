"""Checks of what a method declares, without any data."""

import re
from typing import Any, Final

from mergefs.kernels.fused import FUSED_DTYPES, prepare
from mergefs.methods.contract import BasePolicy, FewModels, Method, Parameter, Scope, Specification
from mergefs.testing.trial import ContractError

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


def check_specification(method: Method[Any]) -> None:
    """The declaration is complete and makes sense: names, defaults within their ranges, numbers of models."""
    declared = method.specification
    if not isinstance(declared, Specification):
        raise ContractError(f"the specification of {type(method).__name__} is a {type(declared).__name__}")
    low, high = declared.min_models, declared.max_models
    names = [parameter.name for parameter in declared.parameters]
    rules = {
        "its name is not made of a-z, 0-9 and _": bool(_NAME.fullmatch(declared.name)),
        "it has no title": bool(declared.title.strip()),
        "its summary is not one line that ends with a full stop": _is_sentence(declared.summary),
        "its reference is no https:// address": declared.reference.startswith("https://"),
        f"min_models is {low}, which is no number of models": low >= 1,
        f"max_models {high} is below min_models {low}": high is None or high >= low,
        "its base is no BasePolicy": isinstance(declared.base, BasePolicy),
        "its few_models is no FewModels": isinstance(declared.few_models, FewModels),
        f"a parameter is declared twice in {names}": len(set(names)) == len(names),
    }
    for parameter in declared.parameters:
        rules |= _parameter_rules(parameter)
    for violation, holds in rules.items():
        if not holds:
            raise ContractError(f"{declared.name}: {violation}")


def _parameter_rules(parameter: Parameter) -> dict[str, bool]:
    """Return what must hold of a parameter, by what is wrong where it does not."""
    what = f"parameter {parameter.name!r}"
    default, low, high = parameter.default, parameter.minimum, parameter.maximum
    return {
        "a parameter has no name": bool(parameter.name.strip()),
        f"{what} has no meaning": bool(parameter.meaning.strip()),
        f"the scope of {what} is no Scope": isinstance(parameter.scope, Scope),
        f"{what} is required and has a default": not (parameter.required and default is not None),
        f"{what} has its minimum above its maximum": low is None or high is None or low <= high,
        f"the default {default!r} of {what} is no {parameter.kind}": default is None
        or isinstance(default, bool) is (parameter.kind == "bool"),
        f"the default {default!r} of {what} is outside of its own range": default is None
        or ((low is None or default >= low) and (high is None or default <= high)),
    }


def _is_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text


def check_kernels(method: Method[Any]) -> None:
    """Every module that ``kernels`` names is there and has a kernel that can be compiled."""
    try:
        prepare(method.kernels(), FUSED_DTYPES)
    except Exception as error:
        raise ContractError(
            f"{method.specification.name}: its kernels cannot be prepared ({type(error).__name__}: {error})"
        ) from error
