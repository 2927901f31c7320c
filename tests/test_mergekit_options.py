"""The options of mergekit's own commands: each works, is told to change nothing, or is refused in a sentence."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from checkpoints import llama_config, llama_tensors, write_model
from examples import METHODS, Families, FamilyKind
from mergekit.common import parse_kmb
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge, run_yaml
from recipes import recipe_document, write_document
from tensors import load_model

from mergefs.cli import main, materialize, mount, plan
from mergefs.cli.mergekit_options import MERGEKIT_OPTIONS, Effect, MergekitOption, Tool
from mergefs.cli.options import ShardSize
from mergefs.tokenizer.files import is_tokenizer_file

SCRIPT = Path(__file__).parent.parent / "scripts" / "document_options.py"
BY_NAME = {option.name: option for option in MERGEKIT_OPTIONS}
OF_BOTH = pytest.mark.parametrize("option", MERGEKIT_OPTIONS, ids=BY_NAME)


def spellings(options: list[click.Option]) -> dict[str, set[str]]:
    """Return every way to write each option of a command."""
    return {option.name or "": {*option.opts, *option.secondary_opts} for option in options}


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


# The table against mergekit


def test_the_table_has_every_option_that_mergekit_has_and_no_other() -> None:
    ours = [option.name for option in MERGEKIT_OPTIONS if option.tool is Tool.YAML]
    assert ours == list(MergeOptions.model_fields)
    common = spellings(options_of(run_yaml.main))
    alone = [name for name in spellings(options_of(multimerge.main)) if name not in common]
    assert sorted(option.name for option in MERGEKIT_OPTIONS if option.tool is Tool.MULTI) == sorted(alone)


@OF_BOTH
def test_an_option_is_spelt_as_mergekit_spells_it(option: MergekitOption) -> None:
    theirs = spellings(options_of(run_yaml.main)) | spellings(options_of(multimerge.main))
    ways = {way for spelling in option.spellings for way in spelling.split("/")}
    assert ways == theirs[option.name] - {"--help"}


@OF_BOTH
@pytest.mark.parametrize(
    "command", [materialize.command, mount.command, plan.command], ids=lambda command: command.name
)
def test_the_commands_know_every_way_to_write_it(command: click.Command, option: MergekitOption) -> None:
    if option.tool is Tool.MULTI and command is not materialize.command:
        return
    known = {way for ways in spellings(options_of(command)).values() for way in ways}
    assert {way for spelling in option.spellings for way in spelling.split("/")} <= known


def test_the_page_for_people_who_come_from_mergekit_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What each option does


def arguments(option: MergekitOption, value: object) -> list[str]:
    """Return how an option is given on the command line."""
    spelling = option.spelling(value)
    return [spelling] if option.takes in ("switch", "flag", "count") else [spelling, str(value)]


def values(option: MergekitOption) -> list[object]:
    """Return values that an option may be given."""
    kinds: dict[str, list[object]] = {"switch": [True, False], "flag": [True], "number": [3], "text": ["some/dir"]}
    return [*kinds[option.takes], *(value for value in option.passed_over if isinstance(value, str))]


UNANSWERED = [
    (option, value) for option in MERGEKIT_OPTIONS if option.effect is not Effect.WORKS for value in values(option)
]


@pytest.mark.parametrize(("option", "value"), UNANSWERED, ids=lambda one: getattr(one, "name", str(one)))
def test_an_option_that_does_nothing_is_told_or_refused_unless_it_asks_for_what_is_done_anyway(
    option: MergekitOption, value: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status = main(["materialize", str(tmp_path / "no.yml"), str(tmp_path / "out"), *arguments(option, value)])
    lines = capsys.readouterr().err.splitlines()
    spelling = option.spelling(value)
    if value in option.passed_over:
        assert (status, len(lines)) == (1, 1)
    elif option.effect is Effect.REFUSED:
        assert status == 2
        assert lines == [f"mergefs: error: {spelling} cannot be used: {option.explanation}"]
    else:
        assert status == 1
        assert lines[0] == f"mergefs: note: {spelling} changes nothing: {option.explanation}"
    assert status == 2 or "there is no such recipe" in lines[-1]


@pytest.mark.parametrize("command", ["plan", "mount"])
def test_the_other_commands_answer_alike(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = [str(tmp_path)] if command == "mount" else []
    assert main([command, "no.yml", *target, "--cuda"]) == 2
    assert capsys.readouterr().err.startswith("mergefs: error: --cuda cannot be used: ")
    assert main([command, "no.yml", *target, "--intermediate-dir", "x"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_every_explanation_ends_a_sentence() -> None:
    for option in MERGEKIT_OPTIONS:
        assert option.explanation[0].islower() or option.explanation.startswith("`")
        assert not option.explanation.endswith(".")
        assert "|" not in option.explanation  # it stands in a table


# Options that work


@pytest.fixture
def recipe(tmp_path: Path, families: Families) -> Path:
    return write_document(tmp_path / "recipe.yml", recipe_document(METHODS["ties"], families(FamilyKind())))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Put back what options set for libraries and for other processes."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("text", ["5B", "500M", "20k", "123", "7b"])
def test_a_shard_size_is_what_mergekit_makes_of_it(text: str) -> None:
    assert ShardSize().convert(text, None, None) == parse_kmb(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1.5B", 15 * 10**8), ("10GiB", 10 * 2**30), ("2GB", 2 * 10**9), ("5 KB", 5000)]
)
def test_a_shard_size_may_have_a_point_and_a_unit(text: str, size: int) -> None:
    assert ShardSize().convert(text, None, None) == size


def test_mergekit_counts_the_bytes_of_a_shard_and_so_do_we(tmp_path: Path, recipe: Path) -> None:
    with TensorWriter(str(tmp_path / "theirs"), max_shard_size=parse_kmb("5K")) as writer:
        for name in "abc":
            writer.save_tensor(name, torch.zeros(1000))  # 3,000 elements in all, but 12,000 bytes
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == 3
    assert main(["materialize", str(recipe), str(tmp_path / "ours"), "--out-shard-size", "20K"]) == 0
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    sizes = {name: (tmp_path / "ours" / name).stat().st_size for name in index["weight_map"].values()}
    assert len(sizes) > 2
    assert all(size <= 20_000 + 4096 for size in sizes.values())


@pytest.mark.parametrize("size", ["0", "-1", "B", "5X", "a lot"])
def test_a_shard_size_that_is_none_is_wrong_usage(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "r.yml", f"--out-shard-size={size}"]) == 2
    assert "--out-shard-size" in capsys.readouterr().err


def test_two_shard_sizes_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "r.yml", "--out-shard-size=5B", "--max-shard-size=5GB"]) == 2
    assert "say the same; give one of them" in capsys.readouterr().err


def test_the_tokenizer_and_the_model_card_can_be_left_out_and_the_result_verified(tmp_path: Path, recipe: Path) -> None:
    ids = []
    for name, options in (
        ("all", []),
        ("all-said", ["--copy-tokenizer", "--write-model-card"]),
        ("bare", ["--no-copy-tokenizer", "--no-write-model-card"]),
    ):
        assert main(["materialize", str(recipe), str(tmp_path / name), *options]) == 0
        assert main(["verify", "--deep", str(tmp_path / name)]) == 0
        ids.append(json.loads((tmp_path / name / "mergefs.json").read_text())["plan_id"])
    assert ids[0] == ids[1] != ids[2]
    every, bare = ({path.name for path in (tmp_path / name).iterdir()} for name in ("all", "bare"))
    card = {"README.md", "mergekit_config.yml"}
    tokenizer = {name for name in every if is_tokenizer_file(name)}
    assert {"tokenizer.json", "tokenizer_config.json"} <= tokenizer
    assert every - bare == card | tokenizer
    assert bare < every


def test_embeddings_are_cut_to_the_rows_that_all_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = []
    for size in (96, 104):
        tensors = llama_tensors(size, torch.float32, vocabulary=size)
        models.append(write_model(tmp_path / str(size), tensors, llama_config(torch.float32, vocabulary=size)))
    entries = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    recipe = write_document(tmp_path / "r.yml", {"merge_method": "linear", "models": entries})
    command = ["materialize", str(recipe), str(tmp_path / "out")]
    assert main(command) == 1
    assert "only when all shapes agree" in capsys.readouterr().err
    assert main([*command, "--unsafe-truncate-embeddings"]) == 0
    assert main(["verify", "--deep", str(tmp_path / "out")]) == 0
    assert load_model(tmp_path / "out")["model.embed_tokens.weight"].shape == (96, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 96


def test_models_of_the_hub_are_looked_for_in_the_directory_that_is_given(
    tmp_path: Path, families: Families, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "cache" / "models--org--tiny"
    commit = "a1" * 20
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(families(FamilyKind()).base, repository / "snapshots" / commit)
    recipe = write_document(tmp_path / "r.yml", {"merge_method": "passthrough", "models": [{"model": "org/tiny"}]})
    assert main(["plan", str(recipe), "--transformers-cache", str(tmp_path / "elsewhere")]) == 1
    assert f"nor in the Hugging Face cache at '{tmp_path / 'elsewhere'}'" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--transformers-cache", str(tmp_path / "cache")]) == 0


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_says_nothing_but_what_was_asked_for(
    option: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["materialize", str(recipe), str(tmp_path / "out"), "--lazy-unpickle", option]
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*command, "--overwrite", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["directory"] == str(tmp_path / "out")
    assert shown.err == ""


@pytest.mark.parametrize("option", ["-v", "--verbose", "-vv"])
def test_verbose_may_stand_after_the_command(option: str, recipe: Path) -> None:
    assert main(["plan", str(recipe)]) == 0
    assert logging.getLogger("mergefs").level == logging.INFO
    assert main(["plan", str(recipe), option]) == 0
    assert logging.getLogger("mergefs").level == logging.DEBUG


def test_the_seed_is_mergekits_option(tmp_path: Path, families: Families) -> None:
    recipe = write_document(tmp_path / "r.yml", recipe_document(METHODS["dare_ties"], families(FamilyKind())))
    for name, options in (("none", []), ("zero", ["--random-seed", "0"]), ("one", ["--random-seed", "1"])):
        assert main(["materialize", str(recipe), str(tmp_path / name), *options]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("none", "zero", "one")]
    assert weights[0] == weights[1] != weights[2]


def test_a_call_of_mergekit_multi_works_with_its_own_options(
    tmp_path: Path, families: Families, capsys: pytest.CaptureFixture[str]
) -> None:
    family = families(FamilyKind())
    first = {"name": "first", **recipe_document(METHODS["linear"], family)}
    second = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1.0}}]}
    config = tmp_path / "multi.yml"
    config.write_text("---\n".join(json.dumps(document) + "\n" for document in (first, second)))
    out = tmp_path / "out"
    assert main(["materialize", str(config), "--out-path", str(out), "-I", str(tmp_path / "between"), "--lazy"]) == 0
    assert (out / "model.safetensors").is_file()
    assert not (tmp_path / "between").exists()
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" changes nothing")[0] for note in notes] == [
        "mergefs: note: --intermediate-dir",
        "mergefs: note: --lazy",
    ]


def test_without_a_directory_to_write_to_it_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["materialize", "recipe.yml"]) == 2
    assert "there is no OUT beside recipe.yml" in capsys.readouterr().err
