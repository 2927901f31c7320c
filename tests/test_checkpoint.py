"""Opening model directories: which files count, what is refused and in which words."""

import dataclasses
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import family, llama_config, llama_tensors, write_model
from safetensors import safe_open
from safetensors.torch import save_file

from mergefs.checkpoint import DTYPES, Checkpoint, Fingerprint, encode_header, open_checkpoint
from mergefs.checkpoint.auxiliary import LARGEST_UNKNOWN_BYTES
from mergefs.errors import CheckpointError, SourceReadError, UnsupportedCheckpointError

BF16 = torch.bfloat16
INDEX = "model.safetensors.index.json"
REMEDIES = "add|check|convert|delete|did you mean|download|fold|give|move|put|rename|repair|use"


def refusal(directory: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    """Return the sentence that refuses ``directory``; it must name the directory and offer a remedy."""
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    assert re.search(rf"; ({REMEDIES})\b", message), f"no remedy: {message}"
    return message


def weights(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors or {"w": torch.ones(2, 2)}


def directory_with(tmp_path: Path, files: dict[str, dict[str, torch.Tensor]], **config: Any) -> Path:
    """Write a directory with these safetensors files and a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name)
    return tmp_path


def write_index(directory: Path, weight_map: Any) -> Path:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    source = checkpoint.tensors[name]
    with checkpoint.shards[source.shard].path.open("rb") as file:
        file.seek(source.offset)
        return file.read(source.nbytes)


def shard_names(checkpoint: Checkpoint) -> list[str]:
    return [shard.path.name for shard in checkpoint.shards]


# What a sound checkpoint looks like ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_tensor_is_where_the_reference_library_finds_it(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    tensors = llama_tensors(1, dtype)
    model = open_checkpoint(write_model(tmp_path, tensors, llama_config(dtype), shards))

    assert list(model.tensors) == sorted(tensors)
    assert len(model.shards) == shards
    assert model.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        source = model.tensors[name]
        assert (source.name, source.shape, source.dtype.torch_name) == (
            name,
            tuple(tensor.shape),
            str(dtype).removeprefix("torch."),
        )
        with safe_open(model.shards[source.shard].path, framework="pt") as file:
            assert bytes_of(model, name) == file.get_tensor(name).view(torch.uint8).numpy().tobytes()


def test_paths_are_absolute_and_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", weights(), {})
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    model = open_checkpoint(Path("link"))
    assert model.path == (tmp_path / "model").resolve()
    paths = [shard.path for shard in model.shards] + [file.path for file in model.auxiliary]
    assert all(path.is_absolute() for path in paths)


def test_a_path_may_start_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", weights(), {})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint(Path("~/model")).path == (tmp_path / "model").resolve()


def test_only_headers_and_json_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    read_up_to: dict[str, int] = {}
    pread = os.pread

    def recording(descriptor: int, size: int, offset: int) -> bytes:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        read_up_to[name] = max(read_up_to.get(name, 0), offset + size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", recording)
    model = open_checkpoint(tmp_path)

    assert {shard.path.name: read_up_to.pop(shard.path.name) for shard in model.shards} == {
        shard.path.name: shard.header.data_start for shard in model.shards
    }
    assert set(read_up_to) == {"config.json", INDEX}


def test_a_sparse_file_of_half_a_terabyte_opens(tmp_path: Path) -> None:
    directory_with(tmp_path, {})
    encoded = encode_header([("w", DTYPES["BF16"], (2**18, 2**20))], {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(encoded)
        file.truncate(len(encoded) + 2**39)
    assert open_checkpoint(tmp_path).total_bytes == 2**39


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=3)
    before = set(Path("/proc/self/fd").iterdir())
    open_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"broken")
    refusal(tmp_path)
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_of_these_tests_are_whole_models_to_transformers(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = family(tmp_path, experts=1, dtype=BF16, tied=tied, shards=2)
    loaded: Any = AutoModelForCausalLM.from_pretrained(made.experts[0], output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    words = AutoTokenizer.from_pretrained(made.base)("w3 w7", return_tensors="pt").input_ids
    assert words.tolist() == [[3, 7]]
    assert model(words).logits.isfinite().all()


def test_experts_share_elements_and_whole_tensors_with_their_base(tmp_path: Path) -> None:
    made = family(tmp_path, experts=2, dtype=BF16, tied=False, shards=1)
    base, first, second = (open_checkpoint(path) for path in (made.base, *made.experts))
    frozen = [{name for name in base.tensors if bytes_of(base, name) == bytes_of(e, name)} for e in (first, second)]
    assert frozen[0] & frozen[1] == {"model.norm.weight"}
    assert [len(names) for names in frozen] == [2, 2]
    name = "model.layers.1.mlp.up_proj.weight"
    pairs = [
        (bytes_of(base, name)[at : at + 2], bytes_of(first, name)[at : at + 2])
        for at in range(0, base.tensors[name].nbytes, 2)
    ]
    assert 0.1 < sum(a == b for a, b in pairs) / len(pairs) < 0.5


# Which files are the weights -----------------------------------------------------------------------------------------


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


# The index -----------------------------------------------------------------------------------------------------------


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


# What is missing or cannot be read -----------------------------------------------------------------------------------


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


# Other forms of weights ----------------------------------------------------------------------------------------------


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
    assert f"{tmp_path} holds a LoRA adapter" in message
    assert "adapters are not merged by this version" in message
    assert "merge_and_unload()" in message


# Quantised models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize(
    ("declaration", "scheme"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "scheme-of-tomorrow"}, "scheme-of-tomorrow"),
        ({"bits": 3}, "an unnamed method"),
    ],
)
def test_a_declared_quantisation_is_refused_by_name(
    tmp_path: Path, declaration: dict[str, Any], scheme: str, part: str | None
) -> None:
    config: dict[str, Any] = {"quantization_config": declaration}
    write_model(tmp_path, weights(), {part: config} if part else config)
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"is quantised with {scheme} (quantization_config in {tmp_path / 'config.json'})" in message
    assert "use the original weights of the model, or " in message


FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
WORDS = torch.zeros(8, 16, dtype=torch.int32)
CODES = torch.zeros(8, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "scheme", "evidence"),
    [
        ({"q.weight": FP8}, "FP8", "tensor 'q.weight', dtype F8_E4M3)"),
        (
            {"q.weight": FP8, "q.weight_scale_inv": torch.ones(1, 1)},
            "FP8",
            "tensor 'q.weight', dtype F8_E4M3 with the scales 'q.weight_scale_inv')",
        ),
        (
            {"q.weight": FP8.to(torch.float8_e5m2), "q.weight_scale": torch.ones(4)},
            "FP8",
            "tensor 'q.weight', dtype F8_E5M2 with the scales 'q.weight_scale')",
        ),
        (
            {"q.qweight": WORDS, "q.qzeros": WORDS, "q.scales": torch.ones(1, 16), "q.g_idx": WORDS[0]},
            "GPTQ",
            "tensor 'q.qweight', I32 codes",
        ),
        ({"q.qweight": WORDS, "q.scales": torch.ones(1, 16)}, "GPTQ", "tensor 'q.qweight', I32 codes"),
        ({"q.qweight": WORDS, "q.qzeros": WORDS, "q.scales": torch.ones(1, 128)}, "AWQ", "tensor 'q.qweight'"),
        (
            {"q.weight": CODES, "q.weight.absmax": torch.ones(4), "q.weight.quant_map": torch.ones(16)},
            "bitsandbytes",
            "tensor 'q.weight.absmax', quantisation state",
        ),
        (
            {"q.weight.quant_state.bitsandbytes__nf4": CODES[0]},
            "bitsandbytes",
            "tensor 'q.weight.quant_state.bitsandbytes__nf4', quantisation state",
        ),
        ({"q.SCB": torch.ones(4)}, "bitsandbytes", "tensor 'q.SCB', quantisation state"),
        (
            {"experts.down_proj_blocks": CODES, "experts.down_proj_scales": CODES},
            "MXFP4",
            "tensor 'experts.down_proj_blocks', U8 blocks beside U8 scales",
        ),
        ({"q.weight": CODES.to(torch.int8)}, "I8 codes", "tensor 'q.weight', dtype I8"),
        ({"q.weight_packed": WORDS}, "I32 codes", "tensor 'q.weight_packed', dtype I32"),
    ],
)
def test_tensors_give_away_a_quantisation_that_the_config_does_not_declare(
    tmp_path: Path, tensors: dict[str, torch.Tensor], scheme: str, evidence: str
) -> None:
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    write_model(tmp_path, {"norm.weight": torch.ones(4), **separate}, {})
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"is quantised with {scheme} (" in message
    assert evidence in message
    assert "; use the original weights of the model, or " in message


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.kind == "code"], ids=lambda d: d.name)
def test_every_code_dtype_is_refused(tmp_path: Path, dtype: Any) -> None:
    directory_with(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(encode_header([("w", dtype, (8,))], {}) + bytes(dtype.bits))
    assert f"is quantised with FP{dtype.bits} (tensor 'w', dtype {dtype.name})" in refusal(
        tmp_path, UnsupportedCheckpointError
    )


def test_a_declared_quantisation_is_shown_with_its_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, {"q.weight": FP8}, {"quantization_config": {"quant_method": "fp8"}})
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"FP8 (quantization_config in {tmp_path / 'config.json'}; tensor 'q.weight', dtype F8_E4M3)" in message
    assert "FineGrainedFP8Config(dequantize=True)" in message


def test_plain_models_with_unusual_tensors_are_not_taken_for_quantised_ones(tmp_path: Path) -> None:
    tensors = {
        "position_ids": torch.zeros(1, 8, dtype=torch.int64),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "step.weight": torch.zeros(3, dtype=torch.int64),
        "router.scales": torch.ones(4),
        "layer.weight": torch.ones(2, 2, dtype=BF16),
        "layer.weight_scale": torch.ones(2),
        "vision_blocks": torch.ones(2),
        "vision_scales": torch.ones(2),
    }
    undeclared: tuple[dict[str, Any] | None, ...] = (None, {})
    for declaration in undeclared:
        config = {"quantization_config": declaration, "text_config": None}
        assert len(open_checkpoint(write_model(tmp_path, tensors, config)).tensors) == len(tensors)


# Files beside the weights --------------------------------------------------------------------------------------------

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


# Identity ------------------------------------------------------------------------------------------------------------


def test_the_local_identity_stays_while_nobody_writes(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    first = open_checkpoint(tmp_path).local_identity
    assert re.fullmatch("local-[0-9a-f]{64}", first)
    (tmp_path / "README.md").write_text("new")
    assert open_checkpoint(tmp_path).local_identity == first


def touch(shard: Path) -> None:
    os.utime(shard, ns=(1, 1))


def write_the_same_bytes_in_place(shard: Path) -> None:
    """The modification time is put back, but the change time cannot be, once the kernel's clock has ticked."""
    status = shard.stat()
    deadline = time.monotonic() + 10
    while shard.stat().st_ctime_ns == status.st_ctime_ns and time.monotonic() < deadline:
        with shard.open("r+b") as file:
            file.write(shard.read_bytes()[:1])
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_a_copy(shard: Path) -> None:
    copy = shard.with_name("copy")
    shutil.copy2(shard, copy)
    copy.replace(shard)


def pad_the_header(shard: Path) -> None:
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shard.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])


@pytest.mark.parametrize("change", [touch, write_the_same_bytes_in_place, replace_by_a_copy, pad_the_header])
def test_the_local_identity_changes_with_any_change_of_a_shard(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write_model(tmp_path, llama_tensors(1, BF16), llama_config(BF16), shards=2)
    before = open_checkpoint(tmp_path)
    change(tmp_path / "model-00002-of-00002.safetensors")
    after = open_checkpoint(tmp_path)
    assert after.local_identity != before.local_identity
    assert after.shards[0] == before.shards[0]
    assert after.shards[1].fingerprint != before.shards[1].fingerprint


@pytest.mark.parametrize(
    ("field", "matters"),
    [("size", True), ("mtime_ns", True), ("ctime_ns", True), ("inode", True), ("device", False)],
)
def test_the_local_identity_depends_on_each_mark_of_a_file_but_the_device(
    tmp_path: Path, field: str, matters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, weights(), {})
    before = open_checkpoint(tmp_path).local_identity
    real = Fingerprint.of

    def other(status: os.stat_result) -> Fingerprint:
        mark = real(status)
        return dataclasses.replace(mark, **{field: getattr(mark, field) + 1})

    monkeypatch.setattr(Fingerprint, "of", other)
    assert (open_checkpoint(tmp_path).local_identity != before) is matters


def test_the_local_identity_depends_on_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fingerprint, "of", lambda status: Fingerprint(1, 2, 3, 4, 5))
    identities = set()
    for name in ("v", "w"):
        directory_with(tmp_path, {"model.safetensors": {name: torch.ones(2)}})
        identities.add(open_checkpoint(tmp_path).local_identity)
    assert len(identities) == 2


def test_different_models_have_different_identities(tmp_path: Path) -> None:
    made = family(tmp_path, experts=2, dtype=BF16, tied=True, shards=1)
    assert len({open_checkpoint(path).local_identity for path in (made.base, *made.experts)}) == 3


# What config.json says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 32}, 32),
        ({"n_layer": 12}, 12),
        ({"num_layers": 6}, 6),
        ({"text_config": {"num_hidden_layers": 48}}, 48),
        ({"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 48}}, 2),
        ({"num_hidden_layers": "many", "n_layer": True, "text_config": []}, None),
        ({}, None),
    ],
)
def test_the_number_of_layers(tmp_path: Path, config: dict[str, Any], expected: int | None) -> None:
    assert open_checkpoint(write_model(tmp_path, weights(), config)).number_of_layers == expected


@pytest.mark.parametrize(
    ("config", "has_output", "expected"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True, False),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_tied_embeddings_are_as_config_says_and_else_as_the_tensors_show(
    tmp_path: Path, config: dict[str, Any], has_output: bool, expected: bool
) -> None:
    tensors = weights(embed=torch.ones(2, 2)) | ({"lm_head.weight": torch.ones(2, 2)} if has_output else {})
    assert open_checkpoint(write_model(tmp_path, tensors, config)).ties_embeddings is expected


def test_the_config_is_the_content_of_config_json(tmp_path: Path) -> None:
    config = llama_config(BF16)
    assert open_checkpoint(write_model(tmp_path, llama_tensors(1, BF16), config)).config == config
