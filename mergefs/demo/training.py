"""Trains the demo's family: a small Llama on all domains, and for each domain an expert fine-tuned from it."""

import copy
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError

from mergefs.demo.corpus import Domain
from mergefs.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE, write_tokenizer
from mergefs.errors import MergefsError
from mergefs.evaluation.imports import import_transformers

Precision = Literal["auto", "float32", "bfloat16"]
Report = Callable[[str, int, int, float], None]
"""Called after each step with the stage's title, the step (from 1), the stage's steps, and the loss in nats."""

RECORD_NAME: Final = "family.json"
"""Written last: a directory without it holds no finished family."""

_RECORD_VERSION: Final = 1
_UNFINISHED_NAME: Final = ".unfinished-family"


@dataclass(frozen=True, slots=True)
class FamilyOptions:
    """The shape of the models and how long they are trained.

    ``context`` is in bytes, which are the tokens; a step reads ``batch`` windows of it. ``precision`` is that of the
    matrix products in training: ``auto`` takes the one that a short timing finds faster on this machine, and the
    master weights are float32 in any case. ``max_shard_size`` is written as transformers wants it.

    Every ``rehearsal_interval``-th window of an expert is of another domain, each of those in turn (0: none is).
    Fine-tuning on one domain alone makes so short-trained a model forget the others faster than merging mends.
    """

    hidden_size: int = 256
    layers: int = 5
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 704
    context: int = 128
    batch: int = 16
    base_steps: int = 340
    expert_steps: int = 100
    base_learning_rate: float = 2e-3
    expert_learning_rate: float = 1e-3
    rehearsal_interval: int = 8
    weight_decay: float = 0.05
    seed: int = 20
    precision: Precision = "auto"
    max_shard_size: str = "3MB"


@dataclass(frozen=True, slots=True)
class Family:
    """The directories of a finished family; the expert for ``domains[i]`` is ``experts[i]``."""

    base: Path
    experts: tuple[Path, ...]
    domains: tuple[str, ...]


def build_model(options: FamilyOptions) -> Any:
    """Return a LlamaForCausalLM of the options' shape with random float32 weights from torch's generator."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        intermediate_size=options.intermediate_size,
        max_position_embeddings=2 * options.context,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        # For windows this short plain matrix products beat the fused attention of torch's CPU backend.
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).float()


def train_family(
    directory: Path,
    options: FamilyOptions,
    domains: Sequence[Domain],
    report: Report,
    build: Callable[[FamilyOptions], Any] = build_model,
) -> Family:
    """Train a base model on all ``domains`` and an expert on each, and return where under ``directory`` they are.

    Each is a Hugging Face model directory with sharded bfloat16 safetensors and a tokenizer. A finished family of
    the same options and the same text is used again, without a call of ``report``. ``build`` returns the model before
    training, a float32 model of transformers with a vocabulary of bytes, whose name is part of the family's record.
    Raises MergefsError when the directory holds other files under the names that it needs, cannot be written, or
    a domain has less training text than one window; MissingDependencyError without transformers.
    """
    for domain in domains:
        if len(domain.training) <= options.context:
            raise MergefsError(
                f"the domain {domain.name} has {len(domain.training)} bytes of training text, and a window takes "
                f"{options.context + 1}; give it more text or train with a shorter context"
            )
    family = Family(
        directory / "base",
        tuple(directory / f"expert-{domain.name}" for domain in domains),
        tuple(domain.name for domain in domains),
    )
    wanted = _record(family, options, domains, build)
    try:
        recorded = _read_record(directory)
        if recorded == wanted and all(_is_complete(model) for model in (family.base, *family.experts)):
            return family
        _refuse_foreign_models(family, recorded)
        unfinished = directory / _UNFINISHED_NAME
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            _train_models(unfinished, family, options, domains, report, build)
            _install(unfinished, family, wanted)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None) or directory
        raise MergefsError(
            f"{place} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "name a directory for the demo on a disk with some free megabytes"
        ) from error
    return family


def _train_models(
    destination: Path,
    family: Family,
    options: FamilyOptions,
    domains: Sequence[Domain],
    report: Report,
    build: Callable[[FamilyOptions], Any],
) -> None:
    """Train all models and save them under ``destination`` with the names that they have in ``family``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        base = build(options)
    texts = [torch.frombuffer(bytearray(domain.training), dtype=torch.uint8) for domain in domains]
    autocast = _is_autocast_wanted(base, options)

    def stage(model: Any, title: str, number: int, text: Sequence[torch.Tensor]) -> None:
        windows = _windows(text, options, seed=options.seed + number)
        of_base = number == 0
        steps = options.base_steps if of_base else options.expert_steps
        rate = options.base_learning_rate if of_base else options.expert_learning_rate
        # Decay pulls an expert towards zero where its text says nothing: a delta that no domain asked for.
        decay = options.weight_decay if of_base else 0.0
        losses = _training_losses(model, windows, steps, rate, decay, autocast)
        for step, loss in enumerate(losses, start=1):
            report(title, step, steps, loss)

    stage(base, "base on all domains", 0, texts)
    _save(base, options, destination / family.base.name)
    for number, (domain, text, path) in enumerate(zip(domains, texts, family.experts, strict=True), start=1):
        expert = copy.deepcopy(base)
        others = [other for other in texts if other is not text]
        stage(expert, f"expert on {domain.name}", number, _with_rehearsal(text, others, options))
        _save(expert, options, destination / path.name)


def _with_rehearsal(text: torch.Tensor, others: Sequence[torch.Tensor], options: FamilyOptions) -> list[torch.Tensor]:
    """Return the texts that an expert's windows are taken from in turn: its own ``text``, and at times another."""
    if options.rehearsal_interval < 1 or not others:
        return [text]
    own = [text] * (options.rehearsal_interval - 1)
    return [turn for other in others for turn in (*own, other)]


def _windows(texts: Sequence[torch.Tensor], options: FamilyOptions, seed: int) -> Iterator[torch.Tensor]:
    """Yield without end (batch, context + 1) token ids: windows at random offsets, of each text in turn."""
    generator = torch.Generator().manual_seed(seed)
    turns = itertools.cycle(texts)
    while True:
        rows = []
        for text in itertools.islice(turns, options.batch):
            start = int(torch.randint(len(text) - options.context, (), generator=generator))
            rows.append(text[start : start + options.context + 1])
        yield torch.stack(rows).long()


def _training_losses(
    model: Any, windows: Iterator[torch.Tensor], steps: int, rate: float, decay: float, autocast: bool
) -> Iterator[float]:
    """Train ``model`` for ``steps`` steps of AdamW at the peak learning rate ``rate``; yield each step's loss."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    model.train()
    for window in itertools.islice(windows, steps):
        loss = _loss(model, window, autocast)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate for ``step`` (from 0): a short ramp, then a cosine down to 5 %."""
    ramp = max(1, steps // 20)
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _loss(model: Any, window: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Return the mean cross entropy, in nats for each byte, of predicting each next byte of the windows."""
    with _matrix_products(autocast):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def _matrix_products(autocast: bool) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in bfloat16 if ``autocast`` says so."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)


def _is_autocast_wanted(model: Any, options: FamilyOptions) -> bool:
    """Say whether to train with bfloat16 matrix products: as the options demand, or as two timed steps tell."""
    if options.precision != "auto":
        return options.precision == "bfloat16"
    window = torch.zeros((options.batch, options.context + 1), dtype=torch.long)

    def seconds(autocast: bool) -> float:
        best = math.inf
        for _ in range(3):  # the first one of each kind also pays for setting up
            start = time.perf_counter()
            torch.autograd.backward(_loss(model, window, autocast))
            best = min(best, time.perf_counter() - start)
        return best

    wanted = seconds(True) < seconds(False)
    model.zero_grad(set_to_none=True)
    return wanted


def _save(model: Any, options: FamilyOptions, directory: Path) -> None:
    """Write ``model``, rounded to bfloat16, and its tokenizer; the model itself keeps its float32 weights."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(str(directory), max_shard_size=options.max_shard_size)
    write_tokenizer(directory)


def _record(
    family: Family, options: FamilyOptions, domains: Sequence[Domain], build: Callable[[FamilyOptions], Any]
) -> dict[str, Any]:
    """Return what family.json says of a family: enough to know whether it can be used again."""
    texts = {domain.name: hashlib.sha256(domain.training).hexdigest() for domain in domains}
    return {
        "version": _RECORD_VERSION,
        "model": build.__name__,
        "base": family.base.name,
        "experts": [expert.name for expert in family.experts],
        "options": asdict(options),
        "training_text_sha256": texts,
    }


def _read_record(directory: Path) -> dict[str, Any] | None:
    """Return the contents of family.json, or None when there is none or it is no record of a family."""
    try:
        record = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("version") != _RECORD_VERSION:
        return None
    names = record.get("experts")
    return record if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _is_complete(model: Path) -> bool:
    """Say whether a model directory still has its configuration, its tokenizer and each shard of its index."""
    names = {"config.json", "tokenizer.json"}
    index = model / "model.safetensors.index.json"
    try:
        names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        names.add("model.safetensors")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((model / name).is_file() for name in names)


def _refuse_foreign_models(family: Family, recorded: dict[str, Any] | None) -> None:
    """Raise MergefsError when a directory that training would replace is not one that the demo wrote."""
    own = {family.base.name, *recorded["experts"]} if recorded else set()
    for model in (family.base, *family.experts):
        if model.exists() and model.name not in own:
            raise MergefsError(
                f"{model} exists, and {model.parent / RECORD_NAME} does not list it as a model of the demo; "
                "remove it or name another directory for the demo"
            )


def _install(unfinished: Path, family: Family, record: dict[str, Any]) -> None:
    """Move the models from ``unfinished`` to their places, in which older ones of the demo go away."""
    directory = family.base.parent
    (directory / RECORD_NAME).unlink(missing_ok=True)
    for model in (family.base, *family.experts):
        if model.exists():
            shutil.rmtree(model)
        (unfinished / model.name).rename(model)
    written = unfinished / RECORD_NAME
    written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    written.rename(directory / RECORD_NAME)
