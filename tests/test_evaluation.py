"""Comparing merged models on text, without writing any: what is measured, of which models, and what is refused."""

import csv
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family
from mounting import run_mergefs
from recipes import Merge, write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergefs
from mergefs.demo.tokenizer import VOCABULARY_SIZE, write_tokenizer
from mergefs.errors import EvaluationError, UsageError
from mergefs.evaluation.devices import choose_device
from mergefs.evaluation.grid import combinations, parse_axes, variant_text
from mergefs.evaluation.loading import load_model
from mergefs.evaluation.measures import divergence, perplexity
from mergefs.evaluation.text import Windows, cut_into_windows

MERGE = Merge("task_arithmetic", ({"weight": 0.6}, {"weight": 0.4}))
CONTEXT = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two experts and their base with byte tokenizers, that transformers can run."""
    directory = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    made = []
    for number, name in enumerate(("base", "expert-1", "expert-2")):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        if made:
            base = LlamaForCausalLM.from_pretrained(made[0]).state_dict()
            model.load_state_dict({key: base[key] + 0.05 * value for key, value in model.state_dict().items()})
        model.save_pretrained(directory / name)
        write_tokenizer(directory / name)
        made.append(directory / name)
    return Family(made[0], (made[1], made[2]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 20)
    return path


@pytest.fixture
def recipe(models: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "merge.yml", MERGE, models)


def run(*arguments: str | Path, state: Path) -> Any:
    ran = run_mergefs(*arguments, "--json", "--context", str(CONTEXT), "--limit-tokens", "256", state=state)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# Loading --------------------------------------------------------------------------------------------------------------


def test_the_state_dict_of_a_merge_is_what_its_tensors_are(recipe: Path, tmp_path: Path) -> None:
    state = mergefs.load_state_dict(recipe, catalog=tmp_path / "catalog")
    with mergefs.open(recipe, catalog=tmp_path / "catalog") as model:
        assert {*state} == {*model.keys()}
        assert all(torch.equal(tensor, model.get_tensor(name)) for name, tensor in state.items())


def test_transformers_takes_the_state_dict_without_a_directory(models: Family, recipe: Path, tmp_path: Path) -> None:
    state = mergefs.load_state_dict(recipe, catalog=tmp_path / "catalog")
    config = LlamaConfig.from_pretrained(models.base)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16)
    out = tmp_path / "out"
    assert run_mergefs("materialize", recipe, out, state=tmp_path / "state").returncode == 0
    written = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_a_merge_is_run_as_its_written_directory_would_be(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_mergefs("materialize", recipe, out, state=tmp_path / "state").returncode == 0
    merged, written = load_model(recipe, catalog=tmp_path / "catalog"), load_model(out)
    tokens = merged.tokenizer("a fox", return_tensors="pt")["input_ids"]
    assert torch.equal(tokens, written.tokenizer("a fox", return_tensors="pt")["input_ids"])
    assert torch.equal(merged.model(tokens).logits, written.model(tokens).logits)
    assert merged.plan_id is not None
    assert (written.plan_id, written.expert_bytes_read) == (None, None)


def test_a_model_that_transformers_cannot_run_is_refused(models: Family, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}')
    with pytest.raises(EvaluationError, match=r"strange: transformers .* has no class NobodyForCausalLM"):
        load_model(strange)
    (strange / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="names no architecture"):
        load_model(strange)


def test_models_run_in_the_dtype_and_on_the_device_that_are_asked_for(recipe: Path, tmp_path: Path) -> None:
    model = load_model(recipe, "bfloat16", "cpu", catalog=tmp_path / "catalog").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, reason in (("banana", "Expected one of"), ("cuda:99", "CUDA"), ("meta", "meta")):
        with pytest.raises(EvaluationError, match=rf"the device {name} cannot be used \(.*{reason}.*\); give cpu"):
            load_model(recipe, device=name, catalog=tmp_path / "catalog")
        with pytest.raises(EvaluationError, match=rf"the device {name} cannot be used"):
            mergefs.load_state_dict(tmp_path / "nothing.yml", device=name)


# Measures -------------------------------------------------------------------------------------------------------------


class Tables:
    """A model whose next-token logits follow from the last token alone."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.logits[input_ids]})


def test_perplexity_and_divergence_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(5, 5, generator=generator) for _ in range(2))
    windows = Windows(torch.randint(0, 5, (7, 9), generator=generator), 1.0)
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    likelihoods, kls, same = [], [], []
    for row in windows.tokens.tolist():
        for given, following in itertools.pairwise(row):
            likelihoods.append(math.log(p[given, following]))
            kls.append(float((p[given] * (p[given] / q[given]).log()).sum()))
            same.append(int(p[given].argmax()) == int(q[given].argmax()))
    seen: list[int] = []
    assert perplexity(Tables(first), windows, 2, seen.append) == pytest.approx(
        math.exp(-sum(likelihoods) / len(likelihoods)), rel=1e-5
    )
    assert sum(seen) == 7
    found = divergence(Tables(first), Tables(second), windows, 3)
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / len(same))
    assert divergence(Tables(first), Tables(first), windows, 3).kl == 0


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> Mapping[str, list[int]]:
        return {"input_ids": [*range(len(text))]}

    windows = cut_into_windows("x" * 100, tokenizer, 9, 30)
    assert windows.tokens.shape == (3, 10)
    assert windows.tokens[:, 0].tolist() == [0, 30, 60]
    assert windows.predicted == 27
    with pytest.raises(EvaluationError, match="has 5 tokens, and one window takes 10"):
        cut_into_windows("xxxxx", tokenizer, 9, 30)


# Commands -------------------------------------------------------------------------------------------------------------


def test_ab_compares_recipes_variants_and_directories(models: Family, recipe: Path, text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    variant = f"{recipe}@weight.1=1.5"
    first, same, varied, base = run(
        "ab", recipe, f"{recipe}@weight.1=0.6", variant, models.base, "--text", text, "--prompt", "the ", state=state
    )
    assert first["divergence"] is None
    assert same["divergence"] == {"kl": 0, "agreement": 1}
    assert varied["divergence"]["kl"] > 0
    assert base["plan_id"] is None
    assert len({entry["perplexity"] for entry in (first, varied, base)}) == 3
    assert first["perplexity"] == same["perplexity"]
    assert first["completions"] == same["completions"]
    assert first["tokens"] == 256
    told = run_mergefs("ab", recipe, variant, "--text", text, "--context", "16", "--prompt", "the ", state=state)
    assert told.returncode == 0
    assert "KL from merge" in told.stdout
    assert "prompt 'the '" in told.stdout


def test_ab_says_the_same_on_a_gpu_as_on_the_processor(recipe: Path, text: Path, tmp_path: Path) -> None:
    """Where there is no GPU, ``auto`` is the processor, too."""
    models = (recipe, f"{recipe}@weight.1=1.5", "--text", text)
    first, second = (run("ab", *models, "--device", device, state=tmp_path / "state") for device in ("cpu", "auto"))
    for one, other in zip(first, second, strict=True):
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert second[1]["divergence"]["kl"] == pytest.approx(first[1]["divergence"]["kl"], rel=1e-2)


def test_sweep_runs_every_combination_and_saves_a_table_and_a_picture(recipe: Path, text: Path, tmp_path: Path) -> None:
    table, picture = tmp_path / "grid.csv", tmp_path / "grid.png"
    axes = ("--set", "lambda=0.5,1", "--set", "budget=30%,100%")
    found = run("sweep", recipe, *axes, "--text", text, "--csv", table, "--plot", picture, state=tmp_path / "state")
    assert [(cell["lambda"], cell["budget"]) for cell in found] == [
        ("0.5", "30%"), ("0.5", "100%"), ("1", "30%"), ("1", "100%")
    ]  # fmt: skip
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows] == [cell["perplexity"] for cell in found]
    assert [row["plan_id"] for row in rows] == [cell["plan_id"] for cell in found]
    assert found[0]["expert_bytes_read"] < found[1]["expert_bytes_read"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sweep_saves_what_it_finds_beside_printing_it_unless_told_not_to(
    recipe: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ("sweep", recipe, "--set", "lambda=0.5,1", "--text", text, "--context", "16", "--limit-tokens", "64")
    here = tmp_path / "here"
    here.mkdir()
    told = run_mergefs(*arguments, state=tmp_path / "state", cwd=here)
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("wrote merge.sweep.csv\nwrote merge.sweep.png\n")
    assert len((here / "merge.sweep.csv").read_text().splitlines()) == 3
    assert (here / "merge.sweep.png").read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run_mergefs(*arguments, "--no-save", state=tmp_path / "state", cwd=empty).returncode == 0
    assert list(empty.iterdir()) == []


def test_without_matplotlib_a_picture_that_was_asked_for_is_refused_before_anything_is_run(
    recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('as if it were not installed')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    arguments = ("sweep", recipe, "--set", "lambda=1", "--text", text, "--context", "16", "--limit-tokens", "64")
    refused = run_mergefs(*arguments, "--plot", "grid.png", state=tmp_path / "state", cwd=tmp_path)
    assert refused.returncode == 1
    assert "drawing needs matplotlib, which is not installed" in refused.stderr
    assert not (tmp_path / "merge.sweep.csv").exists()
    told = run_mergefs(*arguments, state=tmp_path / "state", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("wrote merge.sweep.csv\n")


@pytest.mark.parametrize("settings", [["density"], ["=1"], ["density="], ["density=1,,2"], ["a=1", "a=2"]])
def test_what_is_no_grid_is_refused(settings: list[str]) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_axes(settings)


def test_the_last_key_of_a_grid_changes_fastest() -> None:
    axes = parse_axes(["a=1,2", "b=x,y,x"])
    assert [variant_text(axes, values) for values in combinations(axes)] == ["a=1,b=x", "a=1,b=y", "a=2,b=x", "a=2,b=y"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ab", "{recipe}", "--text", "{text}"], "nothing to compare"),
        (["ab", "{recipe}", "{recipe}", "--text", "{recipe}.gone"], "cannot be read"),
        (["ab", "{recipe}", "{recipe}", "--text", "{text}", "--context", "999"], "64 positions"),
        (["sweep", "{recipe}", "--text", "{text}", "--set", "colour=1"], "can not be changed"),
        (["sweep", "{recipe}", "--text", "{text}", "--set", "lambda=1", "--plot", "grid.txt"], "what to draw"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    recipe: Path, text: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    filled = [argument.format(recipe=recipe, text=text) for argument in arguments]
    ran = run_mergefs(*filled, state=tmp_path / "state", cwd=tmp_path)
    assert ran.returncode != 0
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
