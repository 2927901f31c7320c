"""Merged vocabularies as they are served: ranges, budgets, mounts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import mounted_recipes, run_mergefs
from recipes import write_document
from tensors import differing, load_model
from tokenizers_models import word_level, write_whole_model
from tokenizers_recipes import build_in_this_process
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergefs
from mergefs.api import MergedModel
from mergefs.errors import BudgetError
from mergefs.planner.plan import MergePlan
from mergefs.tokenizer import service

# Embeddings of several blocks, the last one ragged.
HIDDEN, WORDS = 128, 9000
FILE = "model.safetensors"
EMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")

# A busy machine must not fail a test.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Served:
    """A base and two experts, whose vocabularies differ in order and in tokens, and the catalog that knows them."""

    base: Path
    experts: tuple[Path, Path]
    directory: Path

    def open(self, document: Mapping[str, Any], catalog: str = "catalog", **options: Any) -> MergedModel:
        recipe = write_document(self.directory / "recipe.yml", document)
        return mergefs.open(recipe, catalog=self.directory / catalog, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    words = [f"word{number}" for number in range(WORDS)]
    vocabularies = [words, words[::-1] + ["reversed"], words[5:-100] + [f"new{number}" for number in range(300)]]
    models = [
        write_whole_model(
            directory / str(number), word_level(vocabulary), seed=number, dtype=torch.bfloat16, hidden=HIDDEN
        )
        for number, vocabulary in enumerate(vocabularies)
    ]
    before = service.run_builder
    service.run_builder = build_in_this_process
    yield Served(models[0], (models[1], models[2]), directory)
    service.run_builder = before


def task_arithmetic(served: Served, **tokenizer: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(served.base),
        "models": [{"model": str(expert), "parameters": {"weight": 0.4}} for expert in served.experts],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 64} | tokenizer,
    }


def linear(served: Served, **tokenizer: Any) -> dict[str, Any]:
    document = task_arithmetic(served, **tokenizer)
    del document["base_model"]
    return document | {"merge_method": "linear"}


def read_all(model: MergedModel) -> dict[str, torch.Tensor]:
    return {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)


@pytest.fixture(scope="module")
def whole(served: Served) -> Iterator[tuple[MergedModel, bytes]]:
    """Give the merge with a cache too small for two blocks, and the bytes of its weight file read at once."""
    with served.open(task_arithmetic(served)) as model:
        content = model.read_file(FILE)
    with served.open(task_arithmetic(served), "catalog-of-ranges", cache_size=3 * 2**19) as model:
        yield model, content


@UNTIMED
@given(data=st.data())
def test_any_range_of_the_file_is_that_of_the_whole(whole: tuple[MergedModel, bytes], data: st.DataObject) -> None:
    model, content = whole
    start = data.draw(st.integers(0, len(content) - 1))
    size = data.draw(st.integers(1, 100_000))
    assert model.read_file(FILE, start, size) == content[start : start + size]


# Budgets


def costs_of_tokens_that_the_base_lacks(plan: MergePlan) -> int:
    """Return the expert bytes that the base's own embeddings take."""
    return sum(301 * HIDDEN * 2 for name in plan.tensors if name in EMBEDDINGS)


@pytest.mark.parametrize("budget", ["10%", "33%", "75%"])
@pytest.mark.parametrize("merge", [task_arithmetic, linear])
def test_a_budget_is_kept_to_the_byte(served: Served, merge: Any, budget: str) -> None:
    options = {"base": str(served.base)} if merge is linear else {}
    with served.open(merge(served), budget=budget, **options) as model:
        outcome = model.plan.outcome
        assert outcome.expert_bytes_planned <= outcome.expert_bytes_total * int(budget[:-1]) // 100
        before = model.bytes_read
        read_all(model)
        after = model.bytes_read
        assert 0 < after["expert_bytes_read"] - before["expert_bytes_read"] == outcome.expert_bytes_planned
        assert after["base_bytes_read"] - before["base_bytes_read"] == outcome.base_bytes
        assert after["analysis_bytes_read"] == before["analysis_bytes_read"]


def test_without_a_budget_everything_is_read_once(served: Served) -> None:
    with served.open(task_arithmetic(served)) as model:
        read_all(model)
        assert model.bytes_read["expert_bytes_read"] == model.plan.outcome.expert_bytes_total
        assert model.bytes_read["expert_bytes_reread"] == 0
        assert model.bytes_read["base_bytes_read"] == model.plan.outcome.base_bytes


def test_a_budget_for_everything_is_none(served: Served, whole: tuple[MergedModel, bytes]) -> None:
    with served.open(task_arithmetic(served), budget="100%") as model:
        assert model.plan.outcome.budget_bytes is None
        assert model.read_file(FILE) == whole[1]


def test_what_is_not_bought_is_the_base_with_the_rows_of_the_tokens_that_it_lacks(served: Served) -> None:
    with served.open(task_arithmetic(served)) as model:
        necessary = costs_of_tokens_that_the_base_lacks(model.plan)
    with served.open(task_arithmetic(served), budget=str(necessary)) as model:
        assert model.plan.outcome.expert_bytes_planned == necessary
        ours = read_all(model)
    base = load_model(served.base)
    tokens = AutoTokenizer.from_pretrained(served.base).get_vocab()
    for name, tensor in ours.items():
        rows = len(tokens) if name in EMBEDDINGS else len(tensor)
        assert torch.equal(tensor[:rows], base[name][:rows])
    merged = json.loads(model.read_file("tokenizer.json"))
    added = {entry["content"]: entry["id"] for entry in merged["added_tokens"]}
    expert = load_model(served.experts[1])
    known = AutoTokenizer.from_pretrained(served.experts[1]).get_vocab()
    for name in EMBEDDINGS:
        assert torch.equal(ours[name][added["new7"]], expert[name][known["new7"]])


def test_a_budget_below_the_rows_that_the_base_lacks_is_refused(served: Served) -> None:
    with pytest.raises(BudgetError, match="must be read whole, since nothing stands in for it"):
        served.open(task_arithmetic(served), budget="1KiB")


def test_a_model_that_stands_in_gives_the_rows_of_its_own_tokens(served: Served) -> None:
    """The merge has no base; what is not bought is the named model's, token by token."""
    necessary = 301 * HIDDEN * 2 * len(EMBEDDINGS)
    with served.open(linear(served, pad_to_multiple_of=1), budget=str(2 * necessary), base=str(served.base)) as model:
        selection = {name: model.plan.tensors[name].selection for name in EMBEDDINGS}
        ours = {name: model.get_tensor(name) for name in EMBEDDINGS}
        vocabulary = tokens_of(model)
        grid = model.plan.tensors[EMBEDDINGS[0]].grid
    base, known = load_model(served.base), AutoTokenizer.from_pretrained(served.base).get_vocab()
    rows_of_a_block = grid.step // HIDDEN
    compared = 0
    for name in EMBEDDINGS:
        chosen = selection[name]
        assert chosen is not None
        for token, number in vocabulary.items():
            if token in known and not chosen.computed[number // rows_of_a_block]:
                compared += 1
                if compared % 97 == 0:
                    assert torch.equal(ours[name][number], base[name][known[token]])
    assert compared > WORDS // 2


def tokens_of(model: MergedModel) -> dict[str, int]:
    content = json.loads(model.read_file("tokenizer.json"))
    tokens: dict[str, int] = content["model"]["vocab"]
    return tokens | {entry["content"]: entry["id"] for entry in content["added_tokens"]}


@pytest.mark.parametrize("budget", ["40%", "80%"])
def test_a_budget_is_kept_where_an_expert_is_itself_a_merge_of_vocabularies(
    served: Served, tmp_path: Path, budget: str
) -> None:
    """Rows of the inner merge cost whole blocks of it, and so are bought together or not at all."""
    inner = {"name": "inner", **linear(served)}
    outer = task_arithmetic(served) | {"models": [{"model": "inner", "parameters": {"weight": 0.5}}]}
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump_all([inner, outer]))
    with mergefs.open(recipe, budget=budget, catalog=tmp_path / "catalog") as model:
        outcome = model.plan.outcome
        assert outcome.expert_bytes_planned <= outcome.expert_bytes_total * int(budget[:-1]) // 100
        read_all(model)
        assert 0 < model.bytes_read["expert_bytes_read"] <= outcome.expert_bytes_planned


def test_the_mean_that_padding_gets_is_gathered_once_and_kept(served: Served, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", linear(served))
    reads = []
    for _ in range(2):
        with mergefs.open(recipe, catalog=tmp_path / "catalog") as model:
            slices = model.get_slice(EMBEDDINGS[0])
            slices[-1:]
            slices[-2:]
            reads.append(model.bytes_read["analysis_bytes_read"])
    assert reads[0] > 0
    assert reads[1] == 0


# Mounts


def test_a_mount_shows_a_model_that_transformers_loads(served: Served, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", task_arithmetic(served) | {"chat_template": "chatml"})
    extra = {"MERGEFS_CATALOG": str(tmp_path / "catalog")}
    for attempt in range(2):
        state = tmp_path / f"state-{attempt}"
        with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=state, extra=extra) as mount:
            libraries = Path(f"/proc/{mount.pid}/maps").read_text()
            assert "libtorch" not in libraries
            assert "tokenizers" not in libraries
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mnt")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "mnt")
            shape = model.get_input_embeddings().weight.shape
            tensors = {name: tensor.clone() for name, tensor in load_model(tmp_path / "mnt").items()}
            del model  # it has the files mapped
    tokens = tokenizer.get_vocab()
    assert len(tokens) == WORDS + 3 + 301
    assert shape == (9344, HIDDEN)
    ids = tokenizer("word1 new7 reversed")["input_ids"]
    assert ids == [tokens["word1"], tokens["new7"], tokens["reversed"]]
    with served.open(task_arithmetic(served)) as opened:
        assert differing(tensors, read_all(opened)) == {}


def test_materialize_writes_what_the_command_line_was_asked_for(served: Served, tmp_path: Path) -> None:
    recipe = write_document(tmp_path / "recipe.yml", linear(served, source="base"))
    done = run_mergefs(
        *("--catalog", tmp_path / "catalog", "materialize", recipe, tmp_path / "out"), state=tmp_path / "state"
    )
    assert done.returncode == 0, done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == (
        AutoTokenizer.from_pretrained(served.experts[0]).get_vocab()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 9024
