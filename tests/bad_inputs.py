"""Ways to spoil a model directory, each as somebody might find it on a disk."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
PROJECTION = "model.layers.0.self_attn.q_proj"


def read_model(model: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model that has one weight file."""
    return load_file(model / WEIGHTS)


def write_tensors(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weight file of a model."""
    (model / WEIGHTS).unlink(missing_ok=True)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def change_config(model: Path, **values: Any) -> None:
    """Set keys of ``config.json``."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_element(model: Path, tensor: str, value: float) -> None:
    """Overwrite the third element of a tensor."""
    tensors = read_model(model)
    tensors[tensor].view(-1)[2] = value
    write_tensors(model, tensors)


# Files that lie -------------------------------------------------------------------------------------------------------


def rewrite_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what changes the header's JSON of a weight file, and leaves the data as they are."""

    def spoil(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        document = json.loads(content[8 : 8 + length])
        change(document)
        encoded = json.dumps(document).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return spoil


def _last(document: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the tensor that lies last in the file."""
    entries = [entry for name, entry in document.items() if name != "__metadata__"]
    last: dict[str, Any] = max(entries, key=lambda entry: entry["data_offsets"])
    return last


def _move_last(document: dict[str, Any], distance: int) -> None:
    last = _last(document)
    last["data_offsets"] = [offset + distance for offset in last["data_offsets"]]


leave_a_hole = rewrite_header(lambda document: _move_last(document, 64))
overlap_two_tensors = rewrite_header(lambda document: _move_last(document, -64))
contradict_a_shape = rewrite_header(lambda document: _last(document).update(shape=[3, 7]))
invent_a_dtype = rewrite_header(lambda document: _last(document).update(dtype="F12"))


def truncate(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-100])


def append_bytes(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes() + b"more")


def empty(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"")


def name_a_tensor_twice(model: Path) -> None:
    entry = '"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f"{{{entry},{entry}}}".encode()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


def announce_a_huge_header(model: Path) -> None:
    (model / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{}")


def announce_more_header_than_there_is(model: Path) -> None:
    (model / WEIGHTS).write_bytes(struct.pack("<Q", 5000) + b"{}")


def write_something_else(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


# Models that do not fit -----------------------------------------------------------------------------------------------


def transpose_a_tensor(model: Path) -> None:
    tensors = read_model(model)
    name = "model.layers.1.mlp.down_proj.weight"
    write_tensors(model, tensors | {name: tensors[name].T.contiguous()})


def drop_a_tensor(model: Path) -> None:
    tensors = read_model(model)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(model, tensors)


def add_a_tensor(model: Path) -> None:
    write_tensors(model, read_model(model) | {"model.extra.weight": torch.ones(4, 4, dtype=torch.bfloat16)})


def remove_the_config(model: Path) -> None:
    (model / "config.json").unlink()


def break_the_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def lose_a_shard(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")


# Codes instead of weights, and other formats --------------------------------------------------------------------------


def quantise_to_fp8(model: Path) -> None:
    tensors = read_model(model)
    name = f"{PROJECTION}.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    write_tensors(model, tensors)


def pack(columns: int, with_group_index: bool) -> Callable[[Path], None]:
    """Return what puts packed 4 bit codes, with ``columns`` words in a row, in the place of a projection."""

    def spoil(model: Path) -> None:
        tensors = read_model(model)
        rows, width = tensors.pop(f"{PROJECTION}.weight").shape
        shape = (rows // 8, width) if columns == width else (rows, columns)
        tensors[f"{PROJECTION}.qweight"] = torch.zeros(shape, dtype=torch.int32)
        tensors[f"{PROJECTION}.qzeros"] = torch.zeros(1, 4, dtype=torch.int32)
        tensors[f"{PROJECTION}.scales"] = torch.ones(1, width, dtype=torch.float16)
        if with_group_index:
            tensors[f"{PROJECTION}.g_idx"] = torch.zeros(rows, dtype=torch.int32)
        write_tensors(model, tensors)

    return spoil


def declare(method: str) -> Callable[[Path], None]:
    """Return what says in ``config.json`` that the model is quantised."""
    return lambda model: change_config(model, quantization_config={"quant_method": method})


def pickle_the_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def index_pickles(model: Path) -> None:
    (model / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def put_an_adapter(model: Path) -> None:
    (model / WEIGHTS).rename(model / "adapter_model.safetensors")
