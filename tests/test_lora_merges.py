"""Models with adapters as inputs of whole merges: equal to mergekit's, within the budget, the same by every way."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import Pair, llama, train, write_adapter
from mounting import environment, mounted_recipes, run_mergefs
from oracle import mergekit_merge, nothing_left_to_chance
from recipes import write_document
from safetensors.torch import save_file
from strace import run
from tensors import Tensors, bits, differing, load_model, merge_by_mergefs

import mergefs
from mergefs.errors import CheckpointError, RecipeError, SourceChangedError
from mergefs.sources.blocks import BLOCK_ELEMENTS

BF16, F32 = torch.bfloat16, torch.float32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, slots=True)
class Experts:
    """A base model and adapters that were trained on it."""

    base: Path
    adapters: tuple[Path, ...]

    def reference(self, number: int) -> str:
        return f"{self.base}+{self.adapters[number]}"

    def document(self, method: str, *parameters: Mapping[str, Any], **others: Any) -> dict[str, Any]:
        models = [{"model": self.reference(n), "parameters": dict(given)} for n, given in enumerate(parameters)]
        document: dict[str, Any] = {"merge_method": method, "models": models}
        return document | ({} if method in ("linear", "slerp") else {"base_model": str(self.base)}) | others


def make_experts(directory: Path, dtype: torch.dtype, **shape: Any) -> Experts:
    base = llama(**shape)(directory / "base", dtype)
    configs: tuple[dict[str, Any], ...] = (
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        {"r": 3, "lora_alpha": 7, "target_modules": [*ATTENTION, "embed_tokens"], "use_rslora": True},
        {"r": 2, "target_modules": ["down_proj"], "modules_to_save": ["norm", "lm_head"]},
    )
    for number, config in enumerate(configs):
        train(base, directory / f"adapter-{number}", seed=number + 1, **config)
    return Experts(base, tuple(directory / f"adapter-{number}" for number in range(len(configs))))


@pytest.fixture(scope="module", params=[BF16, F32], ids=["bf16", "f32"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    return make_experts(tmp_path_factory.mktemp("experts"), request.param)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    return make_experts(tmp_path_factory.mktemp("bf16"), BF16)


def theirs(document: Mapping[str, Any], cache: Path) -> Tensors:
    with nothing_left_to_chance(document["merge_method"]):
        return mergekit_merge(document, lora_merge_cache=str(cache))


# Equal to mergekit

DENSITY = ({"weight": 0.7, "density": 0.6}, {"weight": 0.4, "density": 0.3}, {"weight": -0.2, "density": 0.9})
WEIGHT = ({"weight": 0.7}, {"weight": 0.4}, {"weight": -0.2})
DOCUMENTS: dict[str, tuple[str, tuple[dict[str, float], ...], dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", WEIGHT, {}),
    "task_arithmetic in float32": ("task_arithmetic", WEIGHT, {"dtype": "float32", "out_dtype": "bfloat16"}),
    "ties": ("ties", DENSITY, {}),
    "dare_ties": ("dare_ties", DENSITY, {}),
    "linear": ("linear", WEIGHT, {}),
    "slerp": ("slerp", ({}, {}), {"parameters": {"t": 0.3}}),
    "model_stock": ("model_stock", ({}, {}, {}), {}),
}


@pytest.mark.parametrize(("method", "parameters", "others"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_merges_of_adapted_models_equal_mergekit(
    experts: Experts, tmp_path: Path, method: str, parameters: tuple[dict[str, float], ...], others: dict[str, Any]
) -> None:
    document = experts.document(method, *parameters, **others)
    if method == "slerp":
        document["base_model"] = experts.reference(0)
    assert differing(merge_by_mergefs(tmp_path, document), theirs(document, tmp_path / "cache")) == {}


def test_a_base_with_an_adapter_equals_mergekit(experts: Experts, tmp_path: Path) -> None:
    document = experts.document("task_arithmetic", *WEIGHT[:2])
    document["base_model"] = experts.reference(2)
    assert differing(merge_by_mergefs(tmp_path, document), theirs(document, tmp_path / "cache")) == {}


def test_an_adapter_on_another_expert_equals_mergekit(bf16: Experts, tmp_path: Path) -> None:
    other = llama()(tmp_path / "other", BF16)
    tensors = {name: tensor * 1.25 for name, tensor in load_model(other).items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    document = bf16.document("task_arithmetic", WEIGHT[0])
    document["models"].append({"model": f"{other}+{bf16.adapters[1]}", "parameters": WEIGHT[1]})
    assert differing(merge_by_mergefs(tmp_path, document), theirs(document, tmp_path / "cache")) == {}


def test_an_adapter_alone_folds_into_its_model(bf16: Experts, tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": bf16.reference(1)}]}
    assert differing(merge_by_mergefs(tmp_path, document), theirs(document, tmp_path / "cache")) == {}


def test_slices_of_adapted_models_equal_mergekit(tmp_path: Path) -> None:
    experts = make_experts(tmp_path / "made", BF16, layers=3)
    ranges = [(experts.reference(0), [0, 2]), (experts.reference(1), [1, 3])]
    slices = [{"sources": [{"model": model, "layer_range": layers}]} for model, layers in ranges]
    document = {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}
    assert differing(merge_by_mergefs(tmp_path, document), theirs(document, tmp_path / "cache")) == {}


# Ways to name an adapter


def test_every_way_to_name_an_adapter_gives_the_same_model(bf16: Experts, tmp_path: Path) -> None:
    base, adapter = str(bf16.base), str(bf16.adapters[0])
    expected = merge_by_mergefs(tmp_path, bf16.document("task_arithmetic", {"weight": 0.5}))
    ways: list[Any] = [
        {"model": base, "lora": adapter},
        {"model": {"path": base}, "lora": {"path": adapter}},
        adapter,  # it names its model itself
        os.path.relpath(base, tmp_path) + "+" + os.path.relpath(adapter, tmp_path),
    ]
    for way in ways:
        document = bf16.document("task_arithmetic", {"weight": 0.5})
        document["models"][0]["model"] = way
        assert differing(merge_by_mergefs(tmp_path, document), expected) == {}


def copied_adapter(experts: Experts, directory: Path, base_model: str | None, number: int = 0) -> Path:
    """Return a copy of an adapter that names ``base_model`` as its model."""
    shutil.copytree(experts.adapters[number], directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_model}))
    return directory


def test_an_adapter_may_name_its_model_from_where_it_lies(bf16: Experts, tmp_path: Path) -> None:
    shutil.copytree(bf16.base, tmp_path / "models" / "the-base")
    adapter = copied_adapter(bf16, tmp_path / "models" / "adapter", "the-base")
    document = {"merge_method": "passthrough", "models": [{"model": str(adapter)}]}
    expected = {"merge_method": "passthrough", "models": [{"model": bf16.reference(0)}]}
    assert differing(merge_by_mergefs(tmp_path, document), merge_by_mergefs(tmp_path, expected)) == {}


@pytest.mark.parametrize("named", ["/trained/somewhere/else", "no-organisation/no-model", None])
def test_the_base_stands_in_for_a_model_that_is_not_found_and_a_note_says_so(
    bf16: Experts, tmp_path: Path, named: str | None
) -> None:
    adapter = copied_adapter(bf16, tmp_path / "adapter", named)
    document = bf16.document("task_arithmetic", {"weight": 0.5})
    expected = merge_by_mergefs(tmp_path, document)
    document["models"][0]["model"] = str(adapter)
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        (note,) = model.plan.notes
        assert f"{adapter} is applied to {bf16.base}, the base of the recipe" in note
        assert differing({name: model.get_tensor(name) for name in expected}, expected) == {}


def test_an_adapter_without_a_model_is_refused(bf16: Experts, tmp_path: Path) -> None:
    adapter = copied_adapter(bf16, tmp_path / "adapter", "/trained/somewhere/else")
    document = {"merge_method": "linear", "models": [{"model": str(adapter), "parameters": {"weight": 1}}]}
    with pytest.raises(RecipeError, match=r"names '/trained/somewhere/else', which was not found.*MODEL\+"):
        merge_by_mergefs(tmp_path, document)


def test_an_adapter_that_is_not_there_is_named(bf16: Experts, tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": f"{bf16.base}+{tmp_path}/nothing"}]}
    with pytest.raises(RecipeError, match=r"adapter '.*/nothing' was not found"):
        merge_by_mergefs(tmp_path, document)


def test_a_model_in_the_place_of_an_adapter_is_refused(bf16: Experts, tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": f"{bf16.base}+{bf16.base}"}]}
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json, so it is no adapter"):
        merge_by_mergefs(tmp_path, document)


def test_an_adapter_of_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    pair = train(llama(vocabulary=100)(tmp_path / "larger", BF16), tmp_path / "adapter", target_modules=["lm_head"])
    base = llama()(tmp_path / "base", BF16)
    document = {"merge_method": "passthrough", "models": [{"model": f"{base}+{pair.adapter}"}]}
    with pytest.raises(CheckpointError, match=r"'lm_head"):
        merge_by_mergefs(tmp_path, document)


def test_an_adapted_tensor_must_be_floating_point(tmp_path: Path) -> None:
    base = llama()(tmp_path / "base", BF16)
    tensors = load_model(base) | {"model.layers.0.self_attn.steps.weight": torch.ones(4, 4, dtype=torch.int32)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    module = "model.layers.0.self_attn.steps"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    adapter = write_adapter(tmp_path / "adapter", factors)
    document = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    with pytest.raises(CheckpointError, match=r"I32|quantised"):
        merge_by_mergefs(tmp_path, document)


# Embeddings that are no longer tied


def test_a_merge_that_takes_after_an_untied_model_says_so_in_its_config(tmp_path: Path) -> None:
    base = llama(tied=True)(tmp_path / "base", BF16)
    pair = train(base, tmp_path / "adapter", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    document = {"merge_method": "passthrough", "models": [{"model": pair.text}]}
    ours = merge_by_mergefs(tmp_path, document)
    assert differing(ours, theirs(document, tmp_path / "cache")) == {}
    assert "lm_head.weight" in ours
    output = tmp_path / "output"
    done = run_mergefs("materialize", tmp_path / "recipe.yml", output, state=tmp_path / "state")
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False


# The same bytes by every way


def test_mount_open_materialize_and_verify_agree(bf16: Experts, tmp_path: Path, directory: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", bf16.document("ties", *DENSITY))
    with mergefs.open(recipe) as model:
        expected = model.read_file("model.safetensors")
    state, output = tmp_path / "state", tmp_path / "output"
    done = run_mergefs("materialize", recipe, output, state=state)
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").read_bytes() == expected
    verified = run_mergefs("verify", "--deep", output, state=state)
    assert verified.returncode == 0, verified.stderr
    with mounted_recipes(recipe, mountpoint=directory / "mount", state=state) as mount:
        assert (mount.mountpoint / "model.safetensors").read_bytes() == expected


def test_verify_notices_an_adapter_that_is_another_now(bf16: Experts, tmp_path: Path) -> None:
    adapter = copied_adapter(bf16, tmp_path / "adapter", str(bf16.base))
    document = {"merge_method": "passthrough", "models": [{"model": f"{bf16.base}+{adapter}"}]}
    recipe, output = write_document(tmp_path / "recipe.yml", document), tmp_path / "output"
    assert run_mergefs("materialize", recipe, output, state=tmp_path / "state").returncode == 0
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 9}))
    verified = run_mergefs("verify", "--deep", output, state=tmp_path / "state")
    assert verified.returncode == 1
    assert "_proj.weight" in verified.stderr


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_change_of_the_adapter_is_noticed(bf16: Experts, tmp_path: Path, name: str) -> None:
    adapter = copied_adapter(bf16, tmp_path / "adapter", None)
    document = {"merge_method": "passthrough", "models": [{"model": f"{bf16.base}+{adapter}"}]}
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        os.utime(adapter / name)
        with pytest.raises(SourceChangedError, match=name):
            model.files.check("model.safetensors")


def test_the_model_card_names_model_and_adapter_apart(bf16: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", bf16.document("task_arithmetic", WEIGHT[0]))
    with mergefs.open(recipe) as model:
        card = model.read_file("README.md").decode()
    front = card.split("---")[1].splitlines()
    named = [line for line in front if line.startswith('- "')]
    assert named == [f"- {json.dumps(str(path))}" for path in (bf16.base, bf16.adapters[0])]


# Budgets


BUDGETS = ["0", "20%", "60%", "99%", None]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """Models whose embeddings have several blocks."""
    return make_experts(tmp_path_factory.mktemp("large"), BF16, vocabulary=2 * BLOCK_ELEMENTS // 32 + 5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_full_read_takes_no_more_than_planned(large: Experts, tmp_path: Path, budget: str | None) -> None:
    recipe = write_document(tmp_path / "recipe.yml", large.document("ties", *DENSITY))
    with mergefs.open(recipe, budget=budget, catalog=tmp_path / "catalog") as model:
        outcome = model.plan.outcome
        before = model.bytes_read["expert_bytes_read"]
        for file in model.plan.files:
            model.read_file(file.name)
        read = model.bytes_read["expert_bytes_read"] - before
        assert model.bytes_read["expert_bytes_reread"] == 0
    limit = outcome.expert_bytes_total if outcome.budget_bytes is None else outcome.budget_bytes
    assert read <= outcome.expert_bytes_planned <= limit
    assert read > 0 or budget == "0"


def test_without_a_budget_everything_is_read_once(large: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", large.document("task_arithmetic", *WEIGHT))
    with mergefs.open(recipe, catalog=tmp_path / "catalog") as model:
        model.read_file("model.safetensors")
        outcome = model.plan.outcome
        assert model.bytes_read["expert_bytes_read"] == outcome.expert_bytes_planned == outcome.expert_bytes_total
        assert model.bytes_read["expert_bytes_reread"] == 0


def test_what_all_adapters_cost_is_the_size_of_their_files(bf16: Experts, tmp_path: Path) -> None:
    """The bytes of the model below are the base's; of an embedding that is saved beside its factors they are not."""
    recipe = write_document(tmp_path / "recipe.yml", bf16.document("ties", *DENSITY))
    with mergefs.open(recipe) as model:
        stored = sum(sum(t.nbytes for t in load_model(adapter).values()) for adapter in bf16.adapters)
        assert model.plan.outcome.expert_bytes_total == stored


def test_the_kernel_sees_no_more_reads_than_planned(large: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", large.document("task_arithmetic", *WEIGHT))
    state = tmp_path / "state"
    assert run_mergefs("analyze", recipe, state=state).returncode == 0
    planned = run_mergefs("plan", recipe, "--budget", "50%", "--json", state=state)
    outcome = json.loads(planned.stdout)
    arguments = [sys.executable, "-m", "mergefs.cli", "materialize", "--budget", "50%", recipe, tmp_path / "output"]
    trace = run(tmp_path / "trace", arguments, environment(state))
    files = [adapter / "adapter_model.safetensors" for adapter in large.adapters]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert 0 < trace.total(files) - headers <= outcome["expert_bytes_planned"] <= outcome["budget_bytes"]
    assert trace.mapped.isdisjoint(files)


def test_a_tensor_is_bought_as_a_whole_or_not_at_all(large: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", large.document("task_arithmetic", *WEIGHT))
    with mergefs.open(recipe, budget="2%", catalog=tmp_path / "catalog") as model:
        outcomes = set()
        for tensor in model.plan.tensors.values():
            assert tensor.selection is not None
            for index, place in enumerate(tensor.places):
                if not place.divisible:
                    bought = tensor.selection.bought[index]
                    outcomes |= {bool(bought.all()), bool(bought.any())}
                    assert bought.all() == bought.any()
        assert outcomes == {True, False}


def test_a_budget_is_shared_by_an_adapter_and_a_model_of_its_own(large: Experts, tmp_path: Path) -> None:
    """What is bought as a whole and what is bought by blocks compete for the same bytes."""
    other = llama(vocabulary=2 * BLOCK_ELEMENTS // 32 + 5)(tmp_path / "other", BF16)
    document = large.document("task_arithmetic", WEIGHT[0])
    document["models"].append({"model": str(other), "parameters": {"weight": 0.01}})
    recipe = write_document(tmp_path / "recipe.yml", document)
    errors, bought = [], set()
    for budget in ("0", "1%", "3%", "20%", "60%", "99.9%", "100%"):
        with mergefs.open(recipe, budget=budget, catalog=tmp_path / "catalog") as model:
            outcome = model.plan.outcome
            before = model.bytes_read["expert_bytes_read"]
            for file in model.plan.files:
                model.read_file(file.name)
            read = model.bytes_read["expert_bytes_read"] - before
            assert read == outcome.expert_bytes_planned <= (outcome.budget_bytes or outcome.expert_bytes_total)
            errors.append(outcome.predicted_relative_error)
            for tensor in model.plan.tensors.values():
                for index, place in enumerate(tensor.places):
                    if tensor.selection is not None and not place.divisible:
                        assert tensor.selection.bought[index].all() == tensor.selection.bought[index].any()
                        bought.add(bool(tensor.selection.bought[index].all()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] == 0
    assert bought == {True, False}


def test_what_an_adapter_leaves_alone_costs_nothing_and_is_not_measured(bf16: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", bf16.document("task_arithmetic", WEIGHT[0]))
    with mergefs.open(recipe, budget="50%", catalog=tmp_path / "catalog") as model:
        tensor = model.plan.tensors["model.layers.0.mlp.up_proj.weight"]
        assert tensor.expert_bytes == 0
        assert tensor.selection is not None
        assert tensor.selection.bought.all()
        assert not tensor.selection.read[tensor.context.experts[0]].any()  # type: ignore[union-attr]


def test_an_adapter_on_another_expert_pays_for_the_bytes_of_that(bf16: Experts, tmp_path: Path) -> None:
    other = llama()(tmp_path / "other", BF16)
    document = bf16.document("task_arithmetic")
    document["models"] = [{"model": f"{other}+{bf16.adapters[0]}", "parameters": {"weight": 1}}]
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as model:
        sizes = [sum(tensor.nbytes for tensor in load_model(path).values()) for path in (other, bf16.adapters[0])]
        assert model.plan.outcome.expert_bytes_total == sum(sizes)


# Identity


def plan_id(recipe: Path, catalog: Path) -> str:
    with mergefs.open(recipe, budget="50%", catalog=catalog) as model:
        return model.plan.plan_id


def test_a_plan_under_a_budget_has_the_same_id_wherever_model_and_adapter_are(bf16: Experts, tmp_path: Path) -> None:
    shutil.copytree(bf16.base, tmp_path / "moved" / "base")
    shutil.copytree(bf16.adapters[0], tmp_path / "moved" / "adapter")
    moved = Experts(tmp_path / "moved" / "base", (tmp_path / "moved" / "adapter",))
    ids = [
        plan_id(
            write_document(tmp_path / f"{number}.yml", found.document("task_arithmetic", WEIGHT[0])),
            tmp_path / f"catalog-{number}",
        )
        for number, found in enumerate((bf16, moved))
    ]
    assert ids[0] == ids[1]
    assert not ids[0].startswith("local-")


def test_another_adapter_is_another_plan(bf16: Experts, tmp_path: Path) -> None:
    """Whether it is the factors that differ, or only what they are multiplied by."""
    adapter = copied_adapter(bf16, tmp_path / "adapter", None)
    path = adapter / "adapter_config.json"
    found = Experts(bf16.base, (adapter, bf16.adapters[1]))
    recipe = write_document(tmp_path / "recipe.yml", found.document("task_arithmetic", WEIGHT[0]))
    ids = {plan_id(recipe, tmp_path / "catalog")}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    ids.add(plan_id(recipe, tmp_path / "catalog"))
    tensors = load_model(adapter)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, adapter / "adapter_model.safetensors")
    ids.add(plan_id(recipe, tmp_path / "catalog"))
    assert len(ids) == 3


def test_analysis_reads_an_adapter_once(bf16: Experts, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", bf16.document("ties", *DENSITY))
    state = tmp_path / "state"
    first = run_mergefs("analyze", recipe, "--json", state=state)
    again = run_mergefs("analyze", recipe, "--json", state=state)
    assert json.loads(first.stdout)["analysis_bytes_read"] > 0
    assert json.loads(again.stdout)["analysis_bytes_read"] == 0
    models = {entry["path"]: entry["identity"] for entry in json.loads(again.stdout)["models"]}
    assert set(models) == {str(path) for path in (bf16.base, *bf16.adapters)}
    assert not any(identity.startswith("local-") for identity in models.values())
    alone = run_mergefs("analyze", bf16.adapters[0], "--json", state=state)
    assert json.loads(alone.stdout)["models"][0]["identity"] == models[str(bf16.adapters[0])]


def test_a_merge_of_a_merge_with_an_adapter_is_that_of_its_bytes(bf16: Experts, tmp_path: Path) -> None:
    """An adapter can be applied to the result of another document of the recipe."""
    inner = bf16.document("task_arithmetic", WEIGHT[0]) | {"name": "inner"}
    outer = {"merge_method": "passthrough", "models": [{"model": f"inner+{bf16.adapters[1]}"}]}
    both = tmp_path / "both.yml"
    both.write_text(json.dumps(inner) + "\n---\n" + json.dumps(outer) + "\n")
    with mergefs.open(both) as model:
        got = {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)
    written = write_document(tmp_path / "inner.yml", bf16.document("task_arithmetic", WEIGHT[0]))
    assert run_mergefs("materialize", written, tmp_path / "inner", state=tmp_path / "state").returncode == 0
    pair = Pair(tmp_path / "inner", bf16.adapters[1])
    document = {"merge_method": "passthrough", "models": [{"model": pair.text}]}
    assert differing(got, merge_by_mergefs(tmp_path, document)) == {}
    assert differing(got, theirs(document, tmp_path / "cache")) == {}
    assert bits(got["model.embed_tokens.weight"]).any()
