"""Models of the Hugging Face Hub: found in the cache, downloaded where they are not, refused in one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from checkpoints import llama_config, llama_tensors, write_model
from fake_hub import FakeHub, Repository, fake_hub, repository_of
from mounting import environment
from recipes import write_document

from mergefs.cli import main
from mergefs.errors import DownloadError, RecipeError
from mergefs.recipe import hub as hub_module
from mergefs.recipe.hub import find_on_hub
from mergefs.recipe.model import find_model, parse_recipe

NAME = "org/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards, with everything beside them that repositories have."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    dtype = torch.bfloat16
    write_model(directory, llama_tensors(1, dtype, layers=1), llama_config(dtype, layers=1), shards=3)
    for name in ("chat_template.jinja", "modeling_tiny.py", "merges.txt", "LICENSE", "README.md", "nested/extra.json"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f'{{"name": "{name}"}}')
    for name in ("pytorch_model.bin", "consolidated.safetensors", "picture.png", "onnx/model.onnx", "optimizer.pt"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"not wanted")
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[FakeHub]:
    """A Hub that has the model, and a process that may use it, with an empty cache."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    # The library reads its environment once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with fake_hub() as running:
        running.repositories[NAME] = repository_of(model, "v1", "refs/pr/1")
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def hub_repository(hub: FakeHub) -> Repository:
    return hub.repositories[NAME]


def refused(name: str = NAME, revision: str | None = None) -> str:
    """Return why a model cannot be had: one line."""
    with pytest.raises(DownloadError) as caught:
        find_on_hub(name, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_downloaded_with_all_that_it_needs_and_nothing_else(hub: FakeHub, model: Path) -> None:
    snapshot = find_on_hub(NAME, None)
    expected = {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("modeling_tiny.py", "merges.txt", "LICENSE", "README.md", "nested/extra.json"),
        *("model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))),
    }
    assert {str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()} == expected
    assert hub.downloaded() == expected
    for name in expected:
        assert (snapshot / name).read_bytes() == (model / name).read_bytes()


def test_what_is_in_the_cache_is_found_without_the_hub(hub: FakeHub, hub_repository: Repository) -> None:
    snapshot = find_on_hub(NAME, None)
    hub.requests.clear()
    hub_repository.references["main"] = "b" * 40  # a newer one, which nobody asked for
    assert find_on_hub(NAME, None) == find_on_hub(NAME, "main") == find_on_hub(NAME, snapshot.name) == snapshot
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "commit"])
def test_a_revision_is_downloaded(hub: FakeHub, hub_repository: Repository, revision: str) -> None:
    (commit,) = hub_repository.commits
    hub_repository.references["main"] = "b" * 40
    hub_repository.commits["b" * 40] = {"config.json": b"{}"}
    wanted = commit if revision == "commit" else revision
    snapshot = find_on_hub(NAME, wanted)
    assert snapshot.name == commit
    assert find_on_hub(NAME, wanted) == snapshot


def test_a_single_file_is_weights_without_an_index(hub: FakeHub, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", llama_tensors(1, torch.float32, layers=1), llama_config(torch.float32))
    hub.repositories["single"] = repository_of(directory)
    assert (find_on_hub("single", None) / "model.safetensors").stat().st_size > 0


def test_an_adapter_is_downloaded(hub: FakeHub) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"8", "adapter_model.bin": b"9"}
    hub.repositories["org/adapter"] = Repository({"c" * 40: files}, {"main": "c" * 40})
    snapshot = find_on_hub("org/adapter", None)
    assert sorted(p.name for p in snapshot.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    hub.requests.clear()
    assert find_on_hub("org/adapter", None) == snapshot
    assert hub.requests == []


def test_the_token_of_the_environment_opens_a_private_model(
    hub: FakeHub, hub_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_repository.token = "secret"
    said = refused()
    assert said.startswith(f"the Hub at {hub.endpoint} has none of that name, or keeps it private; correct the path")
    assert said.endswith("log in with `hf auth login` or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "another")
    assert refused().startswith(f"the Hub at {hub.endpoint} does not take the token; correct HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert find_on_hub(NAME, None).is_dir()


def test_a_gated_model_is_refused_with_the_page_to_ask_at(hub: FakeHub, hub_repository: Repository) -> None:
    hub_repository.token, hub_repository.gated = "secret", True
    said = refused()
    assert f"ask for it at {hub.endpoint}/{NAME}, then log in" in said


@pytest.mark.parametrize("name", ["org/other", "tiny"])
def test_a_name_that_the_hub_does_not_have_is_refused(hub: FakeHub, name: str) -> None:
    assert "has none of that name" in refused(name)


def test_a_name_that_no_model_can_have_is_refused(hub: FakeHub) -> None:
    assert "has none of that name" in refused("a--b")
    assert hub.requests == []


def test_a_model_that_one_may_not_read_is_refused(hub: FakeHub, hub_repository: Repository) -> None:
    hub_repository.forbidden = True
    assert refused().startswith(f"the Hub at {hub.endpoint} forbids it; log in")


def test_a_revision_that_the_model_does_not_have_is_refused(hub: FakeHub) -> None:
    assert refused(NAME, "v9") == (
        "the Hub has org/tiny, but not at revision v9; name a branch, a tag or a commit of it"
    )
    assert "not at revision" in refused(NAME, "a1" * 20)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json", "pytorch_model.bin"}, "without safetensors, which alone are merged (its weights are in pyto"),
        ({"config.json"}, "there are no weights at all"),
    ],
)
def test_a_model_without_safetensors_is_refused_before_anything_is_downloaded(
    hub: FakeHub, files: set[str], words: str
) -> None:
    hub.repositories["org/old"] = Repository({"c" * 40: dict.fromkeys(files, b"{}")}, {"main": "c" * 40})
    assert words in refused("org/old")
    assert hub.downloaded() == set()


def test_a_hub_that_cannot_be_reached_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refused()
    assert said.startswith("its download from http://127.0.0.1:9 failed (ConnectError: ")
    assert "check the network" in said


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_nothing_is_asked_of_the_hub_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert refused() == (
        f"unset {variable}, which forbids to download it, correct the path, or run `hf download {NAME}`"
    )
    assert hub.requests == []


def test_without_the_extra_the_sentence_says_how_to_get_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused(NAME, "v1") == (
        "install mergefs[hub], with which it would be downloaded, correct the path, or run "
        f"`hf download {NAME} --revision v1`"
    )
    assert hub.requests == []


def test_a_disk_without_room_is_said_before_the_weights_are_fetched(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2048))  # type: ignore[attr-defined]
    said = refused()
    assert said.startswith("the disk has no room for it (its weights take ")
    assert "2.00 KiB are free" in said
    assert said.endswith("name a directory on another disk in HF_HUB_CACHE")
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_a_disk_that_fills_up_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk has no room for it (No space left on device)" in refused()


def test_a_download_that_breaks_off_goes_on_with_the_files_that_are_missing(
    hub: FakeHub, hub_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    shard = "model-00002-of-00003.safetensors"
    hub_repository.cut.add(shard)
    said = refused()
    assert said.startswith(f"its download from {hub.endpoint} failed (")
    assert said.endswith("run the command again, which fetches only the files that are missing")
    hub_repository.cut.clear()
    hub.requests.clear()
    snapshot = find_on_hub(NAME, None)
    assert shard in hub.downloaded()
    assert not any(name.endswith(".json") for name in hub.downloaded())
    assert (snapshot / shard).stat().st_size == len(next(iter(hub_repository.commits.values()))[shard])


def test_ctrl_c_during_a_download_ends_quietly_and_the_next_run_goes_on(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_document(tmp_path / "r.yml", {"merge_method": "passthrough", "models": [{"model": NAME}]})
    original = huggingface_hub.snapshot_download

    def interrupted(*arguments: Any, **options: Any) -> str:
        found = original(*arguments, **options)
        assert not list(Path(found).glob("*.safetensors"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", interrupted)
        assert main(["plan", str(recipe)]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err.strip()) == ("", "mergefs: interrupted")
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())  # they come last
    hub.requests.clear()
    assert main(["plan", str(recipe)]) == 0
    assert {name for name in hub.downloaded() if name.endswith(".json")} == set()


def test_a_snapshot_that_lacks_weights_is_completed_or_taken_as_it_is_offline(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = find_on_hub(NAME, None)
    shard = snapshot / "model-00003-of-00003.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        assert find_on_hub(NAME, None) == snapshot
    assert not shard.exists()
    assert find_on_hub(NAME, None) == snapshot
    assert shard.exists()


def test_a_branch_that_moves_during_the_download_gives_files_of_one_commit(
    hub: FakeHub, hub_repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = hub_repository.commits
    original = hub_module._files
    second = "d" * 40
    hub_repository.commits[second] = {
        name: data for name, data in hub_repository.commits[first].items() if "of-00003" not in name
    } | {"model.safetensors": b"other weights", "config.json": json.dumps({"new": True}).encode()}
    del hub_repository.commits[second]["model.safetensors.index.json"]

    def move(api: Any, name: str, revision: str | None) -> dict[str, int | None]:
        found = original(api, name, revision)
        hub_repository.references["main"] = second
        return found

    monkeypatch.setattr(hub_module, "_files", move)
    snapshot = find_on_hub(NAME, None)
    assert snapshot.name == second
    assert (snapshot / "model.safetensors").read_bytes() == b"other weights"
    assert not list(snapshot.glob("*-of-00003.safetensors"))


def test_a_recipe_names_where_it_looked_before_the_hub_said_no(hub: FakeHub, tmp_path: Path) -> None:
    recipe = parse_recipe("merge_method: passthrough\nmodels: [{model: org/other}]\n", "r.yml", tmp_path)
    with pytest.raises(RecipeError) as caught:
        find_model(recipe.models[0].model, recipe)
    said = str(caught.value)
    assert said.startswith("r.yml:2: model 'org/other' was not found at '")
    assert f"nor in the Hugging Face cache at '{tmp_path / 'huggingface' / 'hub'}'; the Hub at {hub.endpoint}" in said


def test_the_command_downloads_when_it_plans_and_never_again(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": f"{NAME}@v1", "parameters": {"scale": 0.5}}]}
    recipe = write_document(tmp_path / "recipe.yml", document)
    variables = environment(tmp_path / "state")
    del variables["HF_HUB_DISABLE_PROGRESS_BARS"]
    command = [sys.executable, "-m", "mergefs.cli", "materialize", str(recipe)]
    for out, requests in (("first", True), ("second", False)):
        hub.requests.clear()
        done = subprocess.run(
            [*command, str(tmp_path / out)], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert bool(hub.requests) == requests
        assert done.stderr == ""  # no progress where nobody watches
    for name in ("chat_template.jinja", "modeling_tiny.py"):
        assert (tmp_path / "first" / name).read_bytes() == (model / name).read_bytes()
