"""Whole merges with merged tokenizers equal mergekit's: every bit of every tensor, config.json, tokenizer.

The means that padding rows get are fixed to float64 (see ``tokenizers_oracle``); a test without that shows how far
mergekit's own are off.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lora import train
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from oracle import nothing_left_to_chance
from recipes import write_document
from tensors import Tensors, differing, load_model, unit_in_the_last_place
from tokenizers import AddedToken
from tokenizers_models import trained, word_level, write_whole_model
from tokenizers_oracle import exact_padding, orders_fixed
from tokenizers_recipes import quick_builder
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergefs.catalog import Catalog
from mergefs.engine.workspace import Workspace
from mergefs.errors import PlanError, RecipeError
from mergefs.materialize.materialize import materialize
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.plan import MergePlan
from mergefs.recipe.model import load_recipe

pytestmark = pytest.mark.usefixtures("quick_builder")
__all__ = ["quick_builder"]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


class Family:
    """Three models with vocabularies that share some tokens; the second has more rows than tokens."""

    def __init__(self, directory: Path, dtype: torch.dtype, tied: bool, kind: str = "BPE") -> None:
        self.fox, self.code, self.math = (
            write_whole_model(
                directory / topic,
                trained(kind, topic),
                [AddedToken(f"<|{topic}|>", special=True), "<shared>", *(["<both>"] if topic != "fox" else [])],
                rows=rows,
                seed=seed,
                dtype=dtype,
                tied=tied,
                chat_template=f"{{{{ '{topic}' }}}}",
            )
            for seed, (topic, rows) in enumerate((("fox", None), ("code", 80), ("math", None)))
        )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes each kind of family once."""
    made: dict[tuple[Any, ...], Family] = {}

    def get(dtype: torch.dtype = F32, tied: bool = False, kind: str = "BPE") -> Family:
        key = (dtype, tied, kind)
        if key not in made:
            made[key] = Family(tmp_path_factory.mktemp("family"), dtype, tied, kind)
        return made[key]

    return get


def linear(models: Sequence[Path], base: Path | None = None, **entries: Any) -> dict[str, Any]:
    listed = list(dict.fromkeys([*models, *([base] if base else [])]))
    document: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(listed, (0.6, 0.3, 0.4), strict=False)
        ],
        **entries,
    }
    return document if base is None else document | {"base_model": str(base)}


def ties(models: Sequence[Path], base: Path, **entries: Any) -> dict[str, Any]:
    settings = {"weight": 0.7, "density": 0.4}
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": settings} for model in models],
        **entries,
    }


def slerp(models: Sequence[Path], base: Path, **entries: Any) -> dict[str, Any]:
    return {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": {"t": 0.4},
        **entries,
    }


def merge_by_mergekit(document: Mapping[str, Any], directory: Path, **options: Any) -> Path:
    settings = {"quiet": True, "write_model_card": False, "copy_tokenizer": True, **options}
    with orders_fixed():
        run_merge(MergeConfiguration.model_validate(dict(document)), str(directory), MergeOptions(**settings))
    return directory


def merge_by_us(document: Mapping[str, Any], directory: Path, **options: Any) -> Path:
    """Materialize the merge and return its directory."""
    workspace = Workspace.create(Catalog(directory / "catalog"))
    try:
        recipe = load_recipe(write_document(directory / "recipe.yml", document))
        plan = make_plan(recipe, PlanOptions(**options), workspace)
        materialize(plan, directory / "model", workspace)
    finally:
        workspace.close()
    return directory / "model"


def vocabulary(directory: Path) -> dict[str, int]:
    tokens: dict[str, int] = AutoTokenizer.from_pretrained(directory).get_vocab()
    return tokens


def assert_equal_to_mergekit(document: Mapping[str, Any], tmp_path: Path) -> Tensors:
    with nothing_left_to_chance(document["merge_method"]), exact_padding():
        theirs = merge_by_mergekit(document, tmp_path / "theirs")
    ours = merge_by_us(document, tmp_path / "ours")
    tensors = load_model(ours)
    assert differing(tensors, load_model(theirs)) == {}
    assert vocabulary(ours) == vocabulary(theirs)
    sizes = [json.loads((path / "config.json").read_text())["vocab_size"] for path in (ours, theirs)]
    assert sizes[0] == sizes[1] == tensors["model.embed_tokens.weight"].shape[0]
    templates = [AutoTokenizer.from_pretrained(path).chat_template for path in (ours, theirs)]
    assert templates[0] == templates[1]
    AutoModelForCausalLM.from_pretrained(ours)
    return tensors


def sources_of_tokens(family: Family) -> dict[str, Any]:
    """Return settings of tokens that use every source there is."""
    return {
        "<|code|>": {"source": str(family.code), "force": True},
        "<|math|>": {"source": {"kind": "zero"}},
        "<both>": {"source": str(family.math)},
        "<new>": {"source": {"kind": "model_token", "model": str(family.code), "token": "the"}, "force": True},
        "<other>": {"source": {"kind": "model_token", "model": str(family.math), "token_id": 5}},
        "</s>": {"source": {"kind": "model_token", "model": str(family.fox), "token": "<s>"}, "force": True},
        "<s>": {},
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("source", ["union", "base", "code"])
def test_every_source_of_a_vocabulary(
    tmp_path: Path, families: Any, source: str, dtype: torch.dtype, tied: bool
) -> None:
    family = families(dtype, tied)
    tokenizer = {"source": str(family.code) if source == "code" else source}
    models = [family.fox, family.code, family.math]
    tensors = assert_equal_to_mergekit(linear(models, tokenizer=tokenizer), tmp_path)
    assert tensors.keys() & EMBEDDINGS == EMBEDDINGS - ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_tokenizers_of_every_kind(tmp_path: Path, families: Any, kind: str, dtype: torch.dtype) -> None:
    family = families(dtype, False, kind)
    assert_equal_to_mergekit(
        linear([family.fox, family.code, family.math], family.math, tokenizer_source="union"), tmp_path
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("merge", [linear, ties, slerp])
def test_padding_gets_the_mean(tmp_path: Path, families: Any, merge: Any, multiple: int, dtype: torch.dtype) -> None:
    family = families(dtype)
    models = [family.fox, family.code] if merge is slerp else [family.code, family.math]
    tokenizer = {"source": "union", "pad_to_multiple_of": multiple}
    tensors = assert_equal_to_mergekit(merge(models, family.fox, tokenizer=tokenizer), tmp_path)
    assert tensors["model.embed_tokens.weight"].shape[0] % multiple == 0


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("merge", [linear, ties])
def test_tokens_get_what_the_recipe_says(tmp_path: Path, families: Any, merge: Any, dtype: torch.dtype) -> None:
    family = families(dtype)
    tokenizer = {"source": "union", "tokens": sources_of_tokens(family), "pad_to_multiple_of": 16}
    assert_equal_to_mergekit(merge([family.code, family.math], family.fox, tokenizer=tokenizer), tmp_path)


@pytest.mark.parametrize("work", ["float32", "bfloat16", "float16", "float64"])
def test_models_of_several_types_are_merged_in_the_type_of_the_recipe(tmp_path: Path, families: Any, work: str) -> None:
    models = [families(F32).fox, families(BF16).code, families(F16).math]
    tokenizer = {"source": "union", "pad_to_multiple_of": 16}
    assert_equal_to_mergekit(linear(models, tokenizer=tokenizer, dtype=work, out_dtype="bfloat16"), tmp_path)


def test_models_of_several_types_are_merged_in_the_type_that_all_convert_to(tmp_path: Path, families: Any) -> None:
    models = [families(F16).fox, families(BF16).code, families(F16).math]
    assert_equal_to_mergekit(linear(models, tokenizer_source="union"), tmp_path)


def test_a_tied_model_and_one_that_is_not(tmp_path: Path, families: Any) -> None:
    models = [families(BF16, False).fox, families(BF16, True).code]
    assert_equal_to_mergekit(linear(models, models[0], tokenizer_source="union"), tmp_path)


def test_slices_are_merged_by_the_models_of_the_first_and_of_the_last(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    slices = [
        {"sources": [{"model": str(path), "layer_range": [0, 1]} for path in pair]}
        for pair in ((family.fox, family.code), (family.code, family.math))
    ]
    document = {
        "merge_method": "linear",
        "slices": slices,
        "parameters": {"weight": 0.5},
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    assert_equal_to_mergekit(document, tmp_path)


@pytest.mark.parametrize("template", ["auto", "chatml", "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
@pytest.mark.parametrize("tokenizer", [{"tokenizer_source": "union"}, {}], ids=["merged", "kept"])
def test_chat_templates(tmp_path: Path, families: Any, template: str, tokenizer: dict[str, str]) -> None:
    family = families(F32)
    models = [family.fox, family.fox] if not tokenizer else [family.fox, family.math]
    if not tokenizer:
        document = {
            "merge_method": "passthrough",
            "models": [{"model": str(models[0])}],
            "chat_template": template,
        }
    else:
        document = linear(models, chat_template=template, **tokenizer)
    with nothing_left_to_chance(document["merge_method"]):
        theirs = merge_by_mergekit(document, tmp_path / "theirs")
    ours = merge_by_us(document, tmp_path / "ours")
    loaded = [AutoTokenizer.from_pretrained(path) for path in (ours, theirs)]
    assert loaded[0].get_vocab() == loaded[1].get_vocab()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False)
        for tokenizer in loaded
    ]
    assert rendered[0] == rendered[1]


# Vocabularies of different sizes without a merged tokenizer


def test_vocabularies_that_differ_are_refused_with_what_helps(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    with pytest.raises(PlanError) as caught:
        merge_by_us(linear([family.fox, family.code]), tmp_path)
    assert str(caught.value).startswith("tensor 'lm_head.weight' is [80, 32] in ")
    assert str(caught.value).endswith("; add `tokenizer: {source: base}` to the recipe, which makes vocabularies agree")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("merge", [linear, ties])
def test_embeddings_can_be_cut_to_the_rows_that_all_have(
    tmp_path: Path, families: Any, merge: Any, tied: bool, dtype: torch.dtype
) -> None:
    family = families(dtype, tied)
    document = merge([family.fox, family.math], family.code)
    with nothing_left_to_chance(document["merge_method"]):
        theirs = merge_by_mergekit(document, tmp_path / "theirs", unsafe_truncate_embeddings=True)
    ours = merge_by_us(document, tmp_path / "ours", truncate_embeddings=True)
    tensors = load_model(ours)
    assert differing(tensors, load_model(theirs)) == {}
    rows = tensors["model.embed_tokens.weight"].shape[0]
    # mergekit leaves the base's number of rows in config.json, and transformers refuses what it wrote.
    sizes = [json.loads((path / "config.json").read_text())["vocab_size"] for path in (ours, theirs)]
    assert sizes == [rows, 80]
    assert rows < 80
    AutoModelForCausalLM.from_pretrained(ours)


def test_nothing_is_cut_where_all_vocabularies_have_one_size(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    document = linear([family.fox])
    plans = [plan_of(document, tmp_path / str(cut), truncate_embeddings=cut) for cut in (False, True)]
    assert plans[0].tensors["lm_head.weight"].shape == plans[1].tensors["lm_head.weight"].shape
    assert plans[0].config == plans[1].config
    assert plans[0].plan_id != plans[1].plan_id


# Padding as torch sums it


@pytest.mark.parametrize(("dtype", "units"), [(F32, 8), (BF16, 1), (F16, 1)], ids=["f32", "bf16", "f16"])
def test_padding_differs_from_untouched_mergekit_by_the_order_of_its_sums_alone(
    tmp_path: Path, families: Any, dtype: torch.dtype, units: int
) -> None:
    family = families(dtype)
    document = linear([family.fox], tokenizer={"source": "union", "pad_to_multiple_of": 64})
    theirs = load_model(merge_by_mergekit(document, tmp_path / "theirs"))
    ours = load_model(merge_by_us(document, tmp_path / "ours"))
    tokens = len(vocabulary(family.fox))
    for name, tensor in ours.items():
        if name not in EMBEDDINGS:
            assert torch.equal(tensor, theirs[name])
            continue
        assert torch.equal(tensor[:tokens], theirs[name][:tokens])
        mean, expected = tensor[tokens:], theirs[name][tokens:]
        # A mean of numbers of both signs is smaller than they are, and so is off by more of its own last places.
        unit = unit_in_the_last_place(tensor[:tokens].abs().mean(dim=0))
        assert bool(((mean.double() - expected.double()).abs() <= units * unit).all())


# What else the merged model is made of


def plan_of(document: Mapping[str, Any], directory: Path, **options: Any) -> MergePlan:
    directory.mkdir(exist_ok=True)
    workspace = Workspace.create(Catalog(directory / "catalog"))
    try:
        recipe = load_recipe(write_document(directory / "recipe.yml", document))
        return make_plan(recipe, PlanOptions(**options), workspace)
    finally:
        workspace.close()


def test_the_donors_tokenizer_files_give_way_to_the_merged_ones(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    donor = tmp_path / "donor"
    shutil.copytree(family.fox, donor)
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        (donor / name).write_text("{}" if name.endswith("json") else "of the donor alone")
    (donor / "preprocessor_config.json").write_text("{}")
    (donor / "tokenization_own.py").write_text("# code is carried along as data")
    document = linear([donor, family.code], tokenizer_source="union")
    files = {path.name for path in merge_by_us(document, tmp_path / "ours").iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "tokenization_own.py"}
    assert not files & {"tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"}


def test_a_chat_template_without_a_tokenizer_is_told(tmp_path: Path, families: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(families(F32).fox, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    plan = plan_of(linear([bare], chat_template="chatml"), tmp_path / "plan")
    assert plan.notes == (f"the chat template has no effect, because {bare} has no tokenizer that it could belong to",)
    assert "chat_template.jinja" not in plan.companions


def test_no_chat_template_to_choose_from_is_told(tmp_path: Path, families: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(families(F32).fox, bare, ignore=shutil.ignore_patterns("chat_template*"))
    plan = plan_of(linear([bare], chat_template="auto"), tmp_path / "plan")
    assert plan.notes == ("none of the models has a chat template, so 'chat_template: auto' changes nothing",)


def test_what_is_said_of_the_tokenizer_is_part_of_the_plans_identity(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    tokens = {"</s>": {"source": {"kind": "zero"}, "force": True}}
    entries: list[dict[str, Any]] = [
        {},
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
        {"tokenizer": {"source": "union", "tokens": tokens}},
        {"chat_template": "chatml"},
        {"chat_template": "llama3"},
    ]
    ids = {plan_of(linear([family.fox], **entry), tmp_path / "plan").plan_id for entry in entries}
    assert len(ids) == len(entries)


def test_ids_in_config_that_mean_other_tokens_now_are_told(tmp_path: Path, families: Any) -> None:
    donor, other = tmp_path / "donor", tmp_path / "other"
    for directory, words in ((donor, ["a", "b", "c"]), (other, ["c", "a"])):
        write_whole_model(directory, word_level(words))
    config = json.loads((donor / "config.json").read_text())
    ids = {"eos_token_id": [2, 3], "pad_token_id": 4, "image_token_index": 5, "bos_token_id": 1, "sep_token_id": -1}
    (donor / "config.json").write_text(json.dumps(config | ids))
    plan = plan_of(linear([donor, other], tokenizer_source=str(other)), tmp_path / "plan")
    assert plan.notes == (
        f"config.json of {donor} names tokens by ids that they do not have in the merged vocabulary (eos_token_id 3 is "
        "4 now, pad_token_id 4 is gone, image_token_index 5 is 3 now); correct them in the merged model",
    )
    assert plan_of(linear([donor, other], tokenizer_source="union"), tmp_path / "plan").notes == ()


def test_tokens_come_from_models_of_the_recipe(tmp_path: Path, families: Any) -> None:
    family = families(F32)
    tokenizer = {"source": "union", "tokens": {"<new>": {"source": str(family.code)}}}
    with pytest.raises(RecipeError, match=r"token '<new>' gets its embedding from model '.*', which takes no part"):
        plan_of(linear([family.fox], tokenizer=tokenizer), tmp_path / "plan")


def test_a_merge_of_merges_merges_their_tokenizers(tmp_path: Path, families: Any) -> None:
    """Documents of one file, the first result an input of the second; mergekit writes it to a directory between."""
    family = families(F32)
    first = linear([family.fox, family.code], tokenizer={"source": "union", "pad_to_multiple_of": 8})
    second = linear([family.math], tokenizer={"source": "union"}, chat_template="auto")
    one = merge_by_us(first, tmp_path / "one")
    whole = merge_by_us(linear([one, family.math], **_settings(second)), tmp_path / "two")
    text = yaml.safe_dump_all([{"name": "one", **first}, linear([Path("one"), family.math], **_settings(second))])
    (tmp_path / "both.yml").write_text(text)
    workspace = Workspace.create(Catalog(tmp_path / "catalog"))
    try:
        materialize(
            make_plan(load_recipe(tmp_path / "both.yml"), PlanOptions(), workspace), tmp_path / "both", workspace
        )
    finally:
        workspace.close()
    assert differing(load_model(tmp_path / "both"), load_model(whole)) == {}
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "both" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens", "lm_head"], ["v_proj"]], ids=["embeddings", "others"])
def test_rows_of_adapted_models_are_gathered_as_mergekit_does(
    tmp_path: Path, families: Any, targets: list[str]
) -> None:
    family = families(F32)
    train(family.code, tmp_path / "adapter", r=4, target_modules=targets)
    reference = f"{family.code}+{tmp_path / 'adapter'}"
    document = {
        "merge_method": "linear",
        "models": [
            {"model": str(family.fox), "parameters": {"weight": 0.6}},
            {"model": reference, "parameters": {"weight": 0.3}},
        ],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    with exact_padding():
        theirs = merge_by_mergekit(document, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    ours = merge_by_us(document, tmp_path / "ours")
    assert differing(load_model(ours), load_model(theirs)) == {}
    assert vocabulary(ours) == vocabulary(theirs)


def _settings(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("tokenizer", "chat_template")}
