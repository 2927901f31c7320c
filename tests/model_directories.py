"""Model directories for the tests of opening them, good ones and bad ones, and what is asked of a refusal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergefs.checkpoint import Checkpoint, open_checkpoint
from mergefs.errors import CheckpointError

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
