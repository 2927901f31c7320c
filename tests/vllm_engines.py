"""A program for the Python of .venv-vllm: loads engines one after the other and writes down what each generates.

usage: vllm_engines.py QUESTION ANSWER

QUESTION is JSON: ``prompts``, the number of ``tokens`` to generate for each, and ``engines``: of each its ``name``, its
``directory``, ``options`` of ``vllm.LLM``, and the directories whose weights it ``reloads`` in turn. With ``dies`` the
process kills itself when half of the weights are loaded. ANSWER is JSON: for each name what was generated at first and
after every reload, for each prompt the tokens and their log probabilities.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader import default_loader


def generated(engine: LLM, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    """Return what follows each prompt, greedily; one after the other, so that none is in another's batch."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    found = []
    for prompt in prompts:
        output = engine.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]
        chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        found.append({"tokens": list(output.token_ids), "logprobs": chosen})
    return found


def die_in_the_middle() -> None:
    """Have the process killed when it holds a file of weights and has loaded half of its tensors."""
    whole = default_loader.safetensors_weights_iterator

    def half(*arguments: Any, **options: Any) -> Iterator[Any]:
        weights = list(whole(*arguments, **options))
        for number, weight in enumerate(whole(*arguments, **options)):
            if number == len(weights) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield weight

    default_loader.safetensors_weights_iterator = half


def answers(question: dict[str, Any], description: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Load one engine; return what it generates at first, and with the weights of each directory it reloads."""
    if description.get("dies"):
        die_in_the_middle()
    engine = LLM(description["directory"], **question["options"], **description.get("options", {}))
    asked = question["prompts"], question["tokens"]
    found = [generated(engine, *asked)]
    for directory in description.get("reloads", []):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        engine.reset_prefix_cache()  # it was computed with the old weights
        found.append(generated(engine, *asked))
    return found


def main(question_file: str, answer_file: str) -> None:
    question = json.loads(Path(question_file).read_text())
    answer = {}
    for description in question["engines"]:
        answer[description["name"]] = answers(question, description)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
