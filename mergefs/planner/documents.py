"""The files of the merged model that are not weights: config.json, the model card, the recipe, mergefs.json."""

import json
from collections.abc import Mapping
from typing import Any

from mergefs.methods.contract import Method
from mergefs.planner.ancestry import FORMAT, as_json
from mergefs.planner.configuration import encode_config
from mergefs.planner.layout import index_json
from mergefs.planner.plan import MergePlan, PlanInput
from mergefs.units import format_size


def documents(plan: MergePlan) -> dict[str, bytes]:
    """Return the generated files of the merged model by name."""
    files = {"mergefs.json": _provenance(plan)}
    if plan.options.write_model_card:
        files |= {"README.md": _model_card(plan).encode(), "mergekit_config.yml": plan.recipe.text.encode()}
    if plan.config is not None:
        files["config.json"] = encode_config(plan.config)
    if len(plan.files) > 1:
        files["model.safetensors.index.json"] = index_json(
            plan.files, sum(tensor.nbytes for tensor in plan.tensors.values())
        )
    return files


def _provenance(plan: MergePlan) -> bytes:
    """Return mergefs.json: what the model is made of.

    Nothing in it depends on the machine, on the time, or on what the catalog knows of the inputs.
    """
    outcome = plan.outcome
    # Without a budget what is read depends on which blocks are known to be equal.
    planned = {} if outcome.budget_bytes is None else {"expert_bytes_planned": outcome.expert_bytes_planned}
    content: Mapping[str, Any] = {
        "format": FORMAT,
        "plan_id": plan.asked,
        "method": plan.method.specification.name,
        "recipe": plan.recipe.text,
        "inputs": [_input(entry) for entry in plan.inputs],
        "stand_in": None if plan.stand_in is None else _input(plan.stand_in),
        "budget": {
            "budget_bytes": outcome.budget_bytes,
            "expert_bytes_total": outcome.expert_bytes_total,
            **planned,
        },
        **plan.options.recorded(),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _input(entry: PlanInput) -> dict[str, Any]:
    """Return an input, with its own where it is the result of a merge, of this recipe or another."""
    model = entry.model
    return (
        {"reference": entry.reference, "role": entry.role.value, "structure": model.structure}
        | ({} if model.merged is None else {"inputs": [_input(inner) for inner in model.merged.inputs]})
        | ({} if model.made_by is None else {"made_by": as_json(model.made_by)})
    )


def _model_references(plan: MergePlan) -> list[str]:
    """Return the models and adapters that a plan is made of in the end, each once; results of inner merges are none."""
    references = {entry.model.text: entry.model for entry in plan.recipe.inputs()}
    found: list[str] = []
    for entry in plan.inputs:
        reference, inner = references[entry.reference], entry.model.merged
        found += [reference.without_adapter.text] if inner is None else _model_references(inner)
        found += [reference.adapter.text] if reference.adapter is not None else []
    return list(dict.fromkeys(found))


def _model_card(plan: MergePlan) -> str:
    """Return README.md with the front matter that model hubs read."""
    names = _model_references(plan)
    front = ["---", "base_model:", *(f"- {json.dumps(name)}" for name in names), "library_name: transformers"]
    front += ["tags:", "- mergefs", "- mergekit", "- merge", "---"]
    return "\n".join(front) + "\n\n" + _card_text(plan, plan.method)


def _listed_inputs(plan: MergePlan, indent: str = "") -> list[str]:
    """Return the inputs of a plan as a list in Markdown, with those of inner merges below."""
    lines: list[str] = []
    for entry in plan.inputs:
        inner = entry.model.merged
        method = "" if inner is None else f", merged by {inner.method.specification.title}"
        lines.append(f"{indent}* `{entry.reference}` ({entry.role.value}{method})")
        if inner is not None:
            lines += _listed_inputs(inner, indent + "  ")
    return lines


def _card_text(plan: MergePlan, method: Method[Any]) -> str:
    """Return the text of the model card."""
    outcome = plan.outcome
    read = "every expert byte was planned to be read"
    if outcome.budget_bytes is not None and outcome.expert_bytes_planned < outcome.expert_bytes_total:
        read = (
            f"{format_size(outcome.expert_bytes_planned)} of {format_size(outcome.expert_bytes_total)} expert bytes "
            "were planned to be read"
        )
    specification = method.specification
    inputs = "\n".join(_listed_inputs(plan))
    return (
        "# A merged model\n\n"
        f"Merged by mergefs with the method [{specification.title}]({specification.reference}); {read}.\n\n"
        f"## Models\n\n{inputs}\n\n"
        f"## Recipe\n\n```yaml\n{plan.recipe.text.rstrip()}\n```\n"
    )
