"""Real vLLM generates from a mount what it does from a materialized directory, and changes models without a restart."""

import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import yaml
from checkpoints import fine_tuned, llama_config, llama_tensors, write_model
from mounting import DEADLINE, Mount, mounted_recipes, run_mergefs, wait_for
from recipes import write_document
from serving_document import blocks, moved
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers_models import SPECIAL, TEXTS, write_tokenizer
from vllm_processes import Answer, Engine, Server, run_engines, serving

from mergefs.mount.mountinfo import find_mount
from mergefs.mount.unmount import find_holders

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

BF16: Final = torch.bfloat16
SHARDS: Final = ("--max-shard-size", "300KB")
TOKENS: Final = 24
PROMPTS: Final = ("the quick brown", "def main(args):", "0123456789" * 30)
"""The last one is longer than a block of vLLM's cache of prefixes, which must not outlive the weights."""

WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "as it is": {},
    "eager": {"safetensors_load_strategy": "eager"},
    "prefetch": {"safetensors_load_strategy": "prefetch"},
    "with many threads": {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 4}},
    "with the streamer of Run:ai": {"load_format": "runai_streamer"},
}
VARIANTS: Final = ("ties", "ties@density=0.3", "ties@density=0.6", "ties@budget=25%")


@dataclass(frozen=True, slots=True)
class World:
    """Models and a recipe: mounted in a directory of recipes and alone, and variants of it materialized."""

    root: Path
    recipe: Path
    catalog: Path
    mounts: tuple[Mount, Mount]
    scratch: Path
    """Where vLLM keeps its files: a short path, since sockets are among them."""

    @property
    def merged(self) -> Path:
        """The model of the mount that has no other."""
        return self.root / "mnt" / "merged"

    def mounted(self, variant: str) -> Path:
        """The model of a variant in the mount of recipes."""
        return self.root / "mnt" / "models" / variant

    def materialized(self, variant: str) -> Path:
        return self.root / "out" / variant

    def run(self, *words: str | Path) -> None:
        done = run_mergefs(*words, state=self.root / "state", extra={"MERGEFS_CATALOG": str(self.catalog)})
        assert done.returncode == 0, done.stderr


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for texts in TEXTS.values() for text in texts], trainer)
    return tokenizer


def write_models(root: Path) -> list[Path]:
    """Write a base and two experts, with heads of a size that vLLM's attention has on a CPU."""
    tokenizer = byte_level_tokenizer()
    shape: dict[str, Any] = {"hidden": 128, "layers": 2, "vocabulary": tokenizer.get_vocab_size()}
    config = llama_config(BF16, **shape) | {"max_position_embeddings": 512}
    base = llama_tensors(0, BF16, **shape)
    tensors = {
        "base": base,
        "expert-1": fine_tuned(base, BF16, seed=1, frozen=()),
        "expert-2": fine_tuned(base, BF16, seed=2, frozen=()),
    }
    for name, weights in tensors.items():
        write_model(root / name, weights, config, shards=2, tokenizer_files=False)
        write_tokenizer(root / name, tokenizer, model_max_length=512)
    return [root / name for name in tensors]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, catalogs: Path) -> Iterator[World]:
    root = tmp_path_factory.mktemp("vllm")
    base, *experts = write_models(root / "models")
    weights = ({"weight": 3.0, "density": 0.9}, {"weight": 2.0, "density": 0.8})
    document = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(e), "parameters": p} for e, p in zip(experts, weights, strict=True)],
        "parameters": {"normalize": False},
    }
    recipe = write_document(root / "recipes" / "ties.yml", document)
    catalog = catalogs / root.name
    common: dict[str, Any] = {
        "state": root / "state",
        "options": SHARDS,
        "extra": {"MERGEFS_CATALOG": str(catalog)},
    }
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as scratch,
        mounted_recipes(recipe.parent, mountpoint=root / "mnt" / "models", **common) as models,
        mounted_recipes(recipe, mountpoint=root / "mnt" / "merged", **common) as merged,
    ):
        made = World(root, recipe, catalog, (models, merged), Path(scratch))
        made.run("analyze", recipe)
        for variant in VARIANTS:
            changes = variant.removeprefix("ties")
            made.run("materialize", *SHARDS, f"{recipe}{changes}", made.materialized(variant))
        assert len(list(made.mounted("ties").glob("*.safetensors"))) > 2
        yield made


@pytest.fixture(scope="module")
def generated(world: World) -> dict[str, list[Answer]]:
    """Say what engines generate: for each variant from the materialized directory, and in each way from the mount."""
    reloads = [world.mounted(variant) for variant in VARIANTS[1:]]
    engines = [
        *(Engine(variant, world.materialized(variant)) for variant in VARIANTS),
        *(Engine(way, world.merged, options) for way, options in WAYS.items()),
        Engine("changing", world.mounted("ties"), reloads=[*reloads, world.mounted("ties")]),
    ]
    done, answers = run_engines(engines, PROMPTS, TOKENS, world.scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    return answers


@pytest.fixture(scope="module")
def expected(generated: dict[str, list[Answer]]) -> dict[str, Answer]:
    """Say what a fresh engine generates from the materialized directory of each variant."""
    return {variant: generated[variant][0] for variant in VARIANTS}


def test_the_variants_say_different_things(expected: dict[str, Answer]) -> None:
    """Or what follows would prove nothing."""
    for number in range(len(PROMPTS)):
        said = [answer[number] for answer in expected.values()]
        assert len({one.tokens for one in said}) == len(VARIANTS)
        assert all(len(one.tokens) == TOKENS for one in said)


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_generates_from_a_mount_what_it_does_from_the_materialized_directory(
    generated: dict[str, list[Answer]], expected: dict[str, Answer], way: str
) -> None:
    assert generated[way] == [expected["ties"]]


def test_an_engine_takes_the_weights_of_other_variants_without_a_restart(
    generated: dict[str, list[Answer]], expected: dict[str, Answer]
) -> None:
    assert generated["changing"] == [expected[variant] for variant in (*VARIANTS, "ties")]


# -- servers -----------------------------------------------------------------------------------------------------------


def serve_command(world: World) -> tuple[dict[str, str], list[str], str]:
    """Return what docs/serving.md types to serve a model that can be changed: variables, words, and its directory."""
    (typed,) = [text for text in blocks("sh") if "VLLM_SERVER_DEV_MODE" in text]
    words = shlex.split(moved(typed.replace("\\\n", " "), world.root))
    number = words.index("vllm")
    return dict(word.split("=", 1) for word in words[:number]), words[number + 1 :], words[number + 2]


@pytest.fixture(scope="module")
def servers(world: World) -> Iterator[dict[str, Server]]:
    """Serve two variants of one mount side by side, by the commands of the document."""
    extra, words, directory = serve_command(world)
    first = Path(directory).name
    other = "ties@budget=25%"
    changed = [str(world.mounted(other)) if word == directory else word for word in words]
    prefetched = [*changed, "--safetensors-load-strategy", "prefetch"]
    found = {
        first: Server(words, "first", world.scratch, extra),
        other: Server(prefetched, "other", world.scratch, extra),
    }
    with serving(*found.values()):
        yield found


def test_two_servers_on_variants_of_one_mount_say_what_engines_on_materialized_directories_do(
    servers: dict[str, Server], expected: dict[str, Answer]
) -> None:
    for variant, server in servers.items():
        assert server.complete(PROMPTS, TOKENS) == expected[variant]


def change(server: Server, world: World, variant: str) -> "subprocess.CompletedProcess[str]":
    """Have a server take the weights of another variant, by the commands of the document."""
    (typed,) = [text for text in blocks("sh") if "reload_weights" in text]
    asked = re.sub(r'/mnt/models/[^"]+', f"/mnt/models/{variant}", typed).replace("http://127.0.0.1:8000", server.url)
    command = ["bash", "-c", moved(asked, world.root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_a_server_takes_the_weights_of_other_variants_without_a_restart(
    world: World, servers: dict[str, Server], expected: dict[str, Answer]
) -> None:
    first = next(iter(servers))
    server = servers[first]
    for variant in (*VARIANTS, first):
        assert change(server, world, variant).returncode == 0, server.log()
        assert server.complete(PROMPTS, TOKENS) == expected[variant]


def test_a_variant_that_there_is_not_costs_a_server_nothing(world: World, servers: dict[str, Server]) -> None:
    server = next(iter(servers.values()))
    before = server.complete(PROMPTS, TOKENS)
    world.mounts[0].allowed.append("densty")
    done = change(server, world, "ties@densty=0.6")
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr
    assert server.complete(PROMPTS, TOKENS) == before


def test_a_server_takes_the_weights_of_an_edited_recipe(
    world: World, servers: dict[str, Server], expected: dict[str, Answer]
) -> None:
    server = next(iter(servers.values()))
    assert change(server, world, "ties").returncode == 0, server.log()
    document = yaml.safe_load(world.recipe.read_text())
    plan = world.mounted("ties").readlink()
    for model in document["models"]:
        model["parameters"]["density"] = 0.6
    write_document(world.recipe, document)
    wait_for(lambda: world.mounted("ties").readlink() != plan, "the edited recipe")
    assert server.complete(PROMPTS, TOKENS) == expected["ties"], "until it is told, it has what it had"
    assert change(server, world, "ties").returncode == 0, server.log()
    assert server.complete(PROMPTS, TOKENS) == expected["ties@density=0.6"]


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_while_it_loads_holds_nothing(world: World) -> None:
    done, answers = run_engines([Engine("dying", world.merged, dies=True)], PROMPTS, TOKENS, world.scratch)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert answers == {}
    assert_unharmed(world)


def test_servers_that_are_killed_hold_nothing(world: World, servers: dict[str, Server]) -> None:
    for server in servers.values():
        server.stop(signal.SIGKILL)
    assert_unharmed(world)


def assert_unharmed(world: World) -> None:
    for mount in world.mounts:
        entry = find_mount(mount.mountpoint)
        assert entry is not None
        assert find_holders(entry) == ()
    for path in world.materialized("ties").glob("*.safetensors"):
        assert (world.merged / path.name).read_bytes() == path.read_bytes()
