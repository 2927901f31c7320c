"""Opening a sound model directory: its tensors, its identity, and what config.json says."""

import dataclasses
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
from model_directories import BF16, INDEX, bytes_of, directory_with, refusal, weights
from safetensors import safe_open

from mergefs.checkpoint import DTYPES, Fingerprint, encode_header, open_checkpoint

# What a sound checkpoint looks like -----------------------------------------------------------------------------------


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


# Identity -------------------------------------------------------------------------------------------------------------


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


# What config.json says ------------------------------------------------------------------------------------------------


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
