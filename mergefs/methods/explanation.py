"""What a method's declaration says, in words and as the smallest recipe that uses it."""

from mergefs.methods.contract import BasePolicy, FewModels, Parameter, Scope, Specification


def needs_in_words(specification: Specification) -> str:
    """Return what must be known of whole tensors before one can be merged."""
    return specification.needs or "nothing: every element is merged on its own"


def models_in_words(specification: Specification) -> str:
    """Return how many models a recipe may have."""
    low, high = specification.min_models, specification.max_models
    number = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
    if specification.base is not BasePolicy.OPTIONAL:
        return f"{number}, the base among them"
    low, high = specification.min_experts, specification.max_experts
    return f"{low}{' or more' if high is None else '' if low == high else f' to {high}'}, and a base or none"


def missing_in_words(specification: Specification) -> str:
    """Return what becomes of a tensor that not all models have, a bias for example."""
    merged = "merged from the models that have them"
    few = specification.few_models
    return f"{merged}, if these are enough" if few is FewModels.REFUSED else f"{merged}; of too few, {few.value}"


def default_in_words(parameter: Parameter) -> str:
    """Return the default as a recipe writes it."""
    if parameter.required:
        return "required"
    return "none" if parameter.default is None else _in_yaml(parameter.default)


def range_in_words(parameter: Parameter) -> str:
    """Return which values are taken."""
    if parameter.kind == "bool":
        return "true, false"
    bounds = (parameter.minimum, parameter.maximum)
    low, high = ("" if bound is None else f"{bound:g}" for bound in bounds)
    return f"{low} to {high}" if low and high else f"from {low}" if low else f"up to {high}" if high else "any"


def example_recipe(specification: Specification) -> str:
    """Return the smallest sensible recipe that uses the method, as YAML."""
    with_base = specification.base is BasePolicy.REQUIRED
    least = max(1, specification.min_experts, specification.min_models - with_base)
    bounds = (
        specification.max_experts,
        None if specification.max_models is None else specification.max_models - with_base,
    )
    listed = max(least, min(2, *(bound for bound in bounds if bound is not None), 2))
    required = [parameter for parameter in specification.parameters if parameter.required]
    lines = [f"merge_method: {specification.name}", *(["base_model: path/to/base"] if with_base else []), "models:"]
    for number in range(1, listed + 1):
        lines.append(f"- model: path/to/model-{number}")
        lines += _settings([p for p in required if p.scope is not Scope.GLOBAL], "  ")
    lines += _settings([p for p in required if p.scope is Scope.GLOBAL], "")
    return "\n".join(lines) + "\n"


def _settings(parameters: list[Parameter], indent: str) -> list[str]:
    """Return a ``parameters`` table, or nothing where it would be empty."""
    rows = [f"{indent}  {parameter.name}: {_in_yaml(_some_value(parameter))}" for parameter in parameters]
    return [f"{indent}parameters:", *rows] if rows else []


def _some_value(parameter: Parameter) -> float | bool:
    """Return a value that a parameter may have."""
    if parameter.kind == "bool":
        return True
    low, high = parameter.minimum, parameter.maximum
    if parameter.kind == "int":
        return 1 if low is None else int(low)
    if low is not None and high is not None:
        return (low + high) / 2
    return max(low, 0.5) if low is not None else min(high, 0.5) if high is not None else 0.5


def _in_yaml(value: float | bool) -> str:
    return str(value).lower()
