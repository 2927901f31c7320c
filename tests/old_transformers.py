"""A program for transformers 4: loads the files of models side by side.

usage: old_transformers.py [DIRECTORY OUT]...

Writes the tensors of the model in each DIRECTORY to the file OUT, and prints how many files were loaded side by side.
"""

import sys
from typing import Any

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, modeling_utils


def main(*arguments: str) -> None:
    side_by_side = modeling_utils.load_shard_files_with_threadpool

    def counted(files: list[Any]) -> Any:
        print(len(files))
        return side_by_side(files)

    modeling_utils.load_shard_files_with_threadpool = counted
    for directory, out in zip(arguments[::2], arguments[1::2], strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
