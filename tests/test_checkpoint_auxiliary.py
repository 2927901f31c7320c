"""Which files of a model directory belong to the model beside its weights."""

import os
from pathlib import Path

import pytest
from checkpoints import llama_config, llama_tensors, write_model
from model_directories import BF16, refusal, shard_names, weights

from mergefs.checkpoint import open_checkpoint
from mergefs.checkpoint.auxiliary import LARGEST_UNKNOWN_BYTES

KEPT = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "spiece.model",
    ),
    *("preprocessor_config.json", "processor_config.json", "modeling_custom.py", "configuration_custom.py", "LICENSE"),
    *("LICENSE.txt", "NOTICE", "USE_POLICY.md", "unknown-file", "additional_chat_templates/rag.jinja"),
    *("1_Pooling/config.json", "code/deep/inside/module.py", "docs/README.md"),
]
LEFT_OUT = [
    *("README.md", "mergekit_config.yml", "mergefs.json", "mergefs.manifest.json", "adapter_config.json"),
    *(
        "pytorch_model.bin",
        "a.pt",
        "b.pth",
        "c.ckpt",
        "d.gguf",
        "e.onnx",
        "e.onnx_data",
        "f.h5",
        "g.msgpack",
        "h.tflite",
    ),
    *("consolidated.safetensors", "adapter_model.safetensors", "UPPER.BIN", "onnx/model.onnx", "part/w.safetensors"),
    *("pytorch_model.bin.index.json", "model.safetensors.index.json.bak.index.json", ".gitattributes", ".git/config"),
    *(".cache/huggingface/download", "__pycache__/modeling_custom.cpython-311.pyc", "optimizer.pt", "optimizer.bin"),
    *("scheduler.pt", "rng_state_0.pth", "rng_state.json", "trainer_state.json", "training_args.bin"),
    *("checkpoint-500/config.json", "global_step500/mp_rank_00", "runs/events.out.tfevents", "original/params.json"),
]


def test_auxiliary_files_are_what_belongs_to_the_model_beside_its_weights(tmp_path: Path) -> None:
    directory = write_model(tmp_path, weights(), {}, tokenizer_files=False)
    for name in KEPT + LEFT_OUT:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "config.json":
            (directory / name).write_text(name)

    found = open_checkpoint(directory).auxiliary

    assert [file.name for file in found] == sorted(KEPT)
    for file in found:
        status = (directory / file.name).stat()
        assert file.path == directory.resolve() / file.name
        assert (file.fingerprint.size, file.fingerprint.inode) == (status.st_size, status.st_ino)


def test_a_directory_of_the_hugging_face_cache_is_followed_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    write_model(blobs, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))

    model = open_checkpoint(snapshot)

    assert shard_names(model) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in model.auxiliary] == [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    ]
    assert all(shard.fingerprint.size == shard.header.file_size for shard in model.shards)


def test_linked_directories_are_not_walked(tmp_path: Path) -> None:
    write_model(tmp_path / "model", weights(), {}, tokenizer_files=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.txt").write_text("")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "model" / "circle").symlink_to(".")
    found = open_checkpoint(tmp_path / "model").auxiliary
    assert [file.name for file in found] == ["config.json", "generation_config.json"]


def test_pipes_and_sockets_are_left_out(tmp_path: Path) -> None:
    directory = write_model(tmp_path, weights(), {}, tokenizer_files=False)
    os.mkfifo(directory / "pipe.json")
    assert "pipe.json" not in [file.name for file in open_checkpoint(directory).auxiliary]


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path, weights(), {}, tokenizer_files=False)
    (directory / "tokenizer.model").symlink_to("../blobs/gone")
    assert "tokenizer.model is a link to a file that does not exist; download" in refusal(directory)


def test_large_files_are_kept_only_when_their_kind_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_model(tmp_path, weights(), {}, tokenizer_files=False)
    for name in ("tokenizer.json", "dump.raw"):
        with (directory / name).open("wb") as file:
            file.truncate(LARGEST_UNKNOWN_BYTES + 1)
    found = [file.name for file in open_checkpoint(directory).auxiliary]
    assert found == ["config.json", "generation_config.json", "tokenizer.json"]
    assert "dump.raw (64.0 MiB) is left out" in caplog.text
