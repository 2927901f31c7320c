"""Which files of a model directory are its weights, and in which words others are refused."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama_config, llama_tensors, write_model
from model_directories import BF16, INDEX, bytes_of, directory_with, refusal, shard_names, weights, write_index
from safetensors.torch import save_file

from mergefs.checkpoint import open_checkpoint
from mergefs.errors import SourceReadError, UnsupportedCheckpointError

# Which files are the weights ------------------------------------------------------------------------------------------


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"a.safetensors": weights(), "model.safetensors": weights(x=torch.ones(1))})
    assert shard_names(open_checkpoint(write_index(directory, {"w": "a.safetensors"}))) == ["a.safetensors"]


def test_without_an_index_model_safetensors_counts(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"model.safetensors": weights(), "model.fp16.safetensors": weights()})
    assert shard_names(open_checkpoint(directory)) == ["model.safetensors"]


def test_numbered_shards_need_no_index(tmp_path: Path) -> None:
    files = {f"model-0000{n}-of-00003.safetensors": weights(**{f"w{n}": torch.ones(n)}) for n in (3, 1, 2)}
    model = open_checkpoint(directory_with(tmp_path, files))
    assert shard_names(model) == sorted(files)
    assert [(name, source.shard) for name, source in model.tensors.items()] == [("w1", 0), ("w2", 1), ("w3", 2)]


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"my-merge.safetensors": weights()})
    assert shard_names(open_checkpoint(directory)) == ["my-merge.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "other.safetensors"])
def test_consolidated_files_are_never_read_beside_others(tmp_path: Path, name: str) -> None:
    files = {
        name: weights(),
        "consolidated.safetensors": weights(),
        "consolidated-00001-of-00001.safetensors": weights(),
    }
    assert shard_names(open_checkpoint(directory_with(tmp_path, files))) == [name]


def test_a_consolidated_file_alone_is_a_file_like_any_other(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"consolidated.safetensors": weights()})
    assert shard_names(open_checkpoint(directory)) == ["consolidated.safetensors"]


def test_adapters_and_optimizer_states_do_not_make_a_model_ambiguous(tmp_path: Path) -> None:
    files = {"mine.safetensors": weights(), "adapter_model.safetensors": weights(), "optimizer.safetensors": weights()}
    model = open_checkpoint(directory_with(tmp_path, files))
    assert shard_names(model) == ["mine.safetensors"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.safetensors", "b.safetensors"], "holds a.safetensors, b.safetensors, but no model.safetensors.index.json"),
        (["model-00001-of-00001.safetensors", "extra.safetensors"], "holds extra.safetensors, model-00001-of-00001"),
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "lacks model-00002-of-00003"),
        (["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"], "holds shards of 2 models"),
        (["a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"], "holds shards of 2 models"),
        (["model-00005-of-00001.safetensors"], "model-00005-of-00001.safetensors does not fit into a set of 1 shards"),
        (["model-00000-of-00001.safetensors"], "model-00000-of-00001.safetensors does not fit into a set of 1 shards"),
        (["model-1-of-1.safetensors", "model-00001-of-00001.safetensors"], "does not fit into a set of 1 shards"),
    ],
)
def test_files_that_do_not_plainly_make_one_model_are_refused(tmp_path: Path, names: list[str], sentence: str) -> None:
    assert sentence in refusal(directory_with(tmp_path, {name: weights() for name in names}))


# The index ------------------------------------------------------------------------------------------------------------


def test_an_index_may_name_files_in_subdirectories(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"part/a.safetensors": weights()})
    model = open_checkpoint(write_index(directory, {"w": "./part/a.safetensors"}))
    assert [shard.path for shard in model.shards] == [directory.resolve() / "part" / "a.safetensors"]


def test_a_tensor_that_the_index_forgets_is_kept(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"a.safetensors": weights(w=torch.ones(1), forgotten=torch.ones(2))})
    assert list(open_checkpoint(write_index(directory, {"w": "a.safetensors"})).tensors) == ["forgotten", "w"]


def test_the_index_decides_between_two_shards_that_hold_the_same_name(tmp_path: Path) -> None:
    files = {
        "a.safetensors": weights(w=torch.zeros(1), x=torch.zeros(1)),
        "b.safetensors": weights(w=torch.ones(1), y=torch.zeros(1)),
    }
    directory = directory_with(tmp_path, files)
    identities = set()
    for name, expected in (("a.safetensors", 0.0), ("b.safetensors", 1.0)):
        write_index(directory, {"w": name, "x": "a.safetensors", "y": "b.safetensors"})
        model = open_checkpoint(directory)
        assert bytes_of(model, "w") == torch.tensor([expected]).numpy().tobytes()
        assert model.total_bytes == 12
        identities.add(model.local_identity)
    assert len(identities) == 2


def test_a_name_in_two_shards_that_no_index_settles_is_refused(tmp_path: Path) -> None:
    files = {f"model-0000{n}-of-00002.safetensors": weights() for n in (1, 2)}
    directory = directory_with(tmp_path, files)
    sentence = "holds tensor 'w' both in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"
    assert sentence in refusal(directory)

    save_file(weights(w=torch.ones(1), x=torch.ones(1)), tmp_path / "model-00001-of-00002.safetensors")
    save_file(weights(w=torch.ones(1), y=torch.ones(1)), tmp_path / "model-00002-of-00002.safetensors")
    write_index(directory, {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"})
    assert sentence in refusal(directory)


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"w": "absent.safetensors"}, "absent.safetensors does not exist, but model.safetensors.index.json says"),
        ({"w": "dangling.safetensors"}, "dangling.safetensors does not exist, but model.safetensors.index.json says"),
        ({"v": "a.safetensors"}, "says that a.safetensors holds tensor 'v', but it does not"),
        ({"w": "b.safetensors", "x": "a.safetensors"}, "says that b.safetensors holds tensor 'w', but it does not"),
        ({"w": "../a.safetensors"}, "maps tensor 'w' to '../a.safetensors', which is outside the model directory"),
        ({"w": "part/../../a.safetensors"}, "which is outside the model directory"),
        ({"w": "/etc/passwd"}, "maps tensor 'w' to '/etc/passwd', which is outside the model directory"),
        ({"w": "a\0.safetensors"}, "which is outside the model directory"),
        ({"w": 1}, "maps tensor 'w' to 1, which is no file name"),
        ({"w": ""}, "maps tensor 'w' to '', which is no file name"),
        ({"w": "."}, "is not a regular file"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, sentence: str) -> None:
    files = {"a.safetensors": weights(w=torch.ones(1), x=torch.ones(1)), "b.safetensors": weights(y=torch.ones(1))}
    directory = directory_with(tmp_path, files)
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    assert sentence in refusal(write_index(directory, weight_map))


def test_an_index_of_pickled_shards_is_refused_as_pickles(tmp_path: Path) -> None:
    directory = write_index(directory_with(tmp_path, {}), {"w": "pytorch_model.bin"})
    assert "holds pickled weights" in refusal(directory, UnsupportedCheckpointError)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is no JSON"),
        (b"", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b"\xff{}", "is no UTF-8 text at byte 0"),
        (b"[]", "holds a JSON list, but must hold an object"),
    ],
)
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_an_index_or_config_that_is_no_json_object_is_refused(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    directory = write_index(directory_with(tmp_path, {"a.safetensors": weights()}), {"w": "a.safetensors"})
    (directory / name).write_bytes(content)
    assert f"{directory / name} {sentence}" in refusal(directory)


# What is missing or cannot be read ------------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    assert "does not exist; check the path, or download the model" in refusal(tmp_path / "absent")


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    file = write_model(tmp_path, weights(), {}) / "model.safetensors"
    assert "is a file, not a model directory; give the directory that holds it" in refusal(file)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be opened (Not a directory)" in refusal(tmp_path / "file" / "model", SourceReadError)


def test_links_that_run_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert "cannot be opened" in refusal(tmp_path / "circle", SourceReadError)


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(SourceReadError, match="cannot be opened"):
        open_checkpoint(Path("a\0b"))


def test_no_config(tmp_path: Path) -> None:
    directory = write_model(tmp_path, weights(), {})
    (directory / "config.json").unlink()
    assert "has no config.json; give a complete Hugging Face model directory" in refusal(directory)


def test_no_weights(tmp_path: Path) -> None:
    assert "holds no weights (no *.safetensors file); download the model's" in refusal(directory_with(tmp_path, {}))


@pytest.mark.parametrize("place", ["checkpoint-500", "snapshots/0123abc"])
def test_weights_one_level_deeper_are_pointed_at(tmp_path: Path, place: str) -> None:
    write_model(tmp_path / place, weights(), {})
    assert f"did you mean {tmp_path / place}?" in refusal(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    directory = write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert f"{shard} is cut off" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00002.safetensors"])
def test_a_file_that_may_not_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    deny(monkeypatch, name)
    message = refusal(directory, SourceReadError)
    assert str(directory / name) in message
    assert "(Permission denied); check that it exists and that you may read it" in message


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let opening files of this name fail as for a user without the permission (tests may run as root)."""
    real: Callable[..., int] = os.open

    def guarded(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(os.fsdecode(path)).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", guarded)


def test_a_disk_that_fails_under_the_config_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path, weights(), {})

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    assert "config.json' cannot be read (Input/output error)" in refusal(directory, SourceReadError)


def test_a_pipe_in_place_of_weights_does_not_block(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {})
    os.mkfifo(directory / "model.safetensors")
    assert "model.safetensors is not a regular file" in refusal(directory)


# Other forms of weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.pth", "c.ckpt"])
def test_pickles_are_refused_with_the_reason_and_the_way_to_convert(tmp_path: Path, name: str) -> None:
    directory = directory_with(tmp_path, {})
    torch.save(weights(), directory / name)
    message = refusal(directory, UnsupportedCheckpointError)
    assert f"{directory / name} holds pickled weights" in message
    assert "unpickling runs code from the file" in message
    assert "from_pretrained(MODEL).save_pretrained(OUTPUT, safe_serialization=True)" in message


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"model.safetensors": weights()})
    torch.save(weights(), directory / "pytorch_model.bin")
    model = open_checkpoint(directory)
    assert (list(model.tensors), [file.name for file in model.auxiliary]) == (["w"], ["config.json"])


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_what_a_trainer_leaves_is_not_taken_for_pickled_weights(tmp_path: Path, name: str) -> None:
    (directory_with(tmp_path, {}) / name).write_bytes(b"")
    assert "holds no weights" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "form"),
    [("model-Q4_K_M.gguf", "GGUF"), ("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("m.onnx", "ONNX")],
)
def test_weights_of_other_frameworks_are_refused_by_name(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"{tmp_path / name} holds weights in {form} form" in message
    assert "use the safetensors files of the original model" in message


@pytest.mark.parametrize("weights_name", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_a_lora_adapter_is_refused_by_name(tmp_path: Path, weights_name: str | None) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    if weights_name is not None:
        save_file(weights(), tmp_path / weights_name)
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"{tmp_path} holds an adapter" in message
    assert "MODEL+ADAPTER" in message
