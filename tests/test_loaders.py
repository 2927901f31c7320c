"""Each way in which libraries load a model reads a mount as it reads the materialized directory."""

import concurrent.futures
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from examples import METHODS, Families, FamilyKind
from fake_uploads import fake_uploads
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
from mounting import ROOT, mounted_recipes
from recipes import recipe_document, write_document
from runai_model_streamer import SafetensorsStreamer
from safetensors import safe_open
from safetensors.torch import load_file
from tensors import differing, load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

import mergefs
from mergefs.materialize.manifest import MANIFEST_NAME
from mergefs.materialize.materialize import materialize

pytestmark = pytest.mark.mounts

OLD_TRANSFORMERS: Final = ROOT / ".venv-transformers-4"
PAGE: Final = mmap.PAGESIZE
SENTENCE: Final = "w5 w17 w90 w42 w8"


@dataclass(frozen=True, slots=True)
class Loadable:
    """One merge in three files: mounted alone, as a link in a mount of recipes, and materialized."""

    recipe: Path
    catalog: Path
    mounted: Path
    linked: Path
    materialized: Path

    def weights(self) -> list[tuple[Path, Path]]:
        """Return each file of weights in both mounts beside the materialized one."""
        names = [path.name for path in sorted(self.materialized.glob("*.safetensors"))]
        return [(mount / name, self.materialized / name) for mount in (self.mounted, self.linked) for name in names]


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory, catalogs: Path, families: Families) -> Iterator[Loadable]:
    root = tmp_path_factory.mktemp("loaders")
    catalog = catalogs / root.name
    recipe = root / "recipes" / "merge.yml"
    write_document(recipe, recipe_document(METHODS["task_arithmetic"], families(FamilyKind())))
    with mergefs.open(recipe, catalog=catalog, max_shard_size="20KB") as model:
        materialize(model.plan, root / "out", model._resources)
    common: dict[str, Any] = {
        "state": root / "state",
        "options": ["--max-shard-size", "20KB"],
        "extra": {"MERGEFS_CATALOG": str(catalog)},
    }
    with (
        mounted_recipes(recipe, mountpoint=root / "rooted", **common),
        mounted_recipes(recipe.parent, mountpoint=root / "live", **common),
    ):
        found = Loadable(recipe, catalog, root / "rooted", root / "live" / "merge", root / "out")
        assert len(found.weights()) >= 4
        yield found


# -- transformers -----------------------------------------------------------------------------------------------------

# transformers 5 reads tensors with several threads unless it is told not to.
WAYS: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]] = {
    "as it is": ({}, {}),
    "in the dtype of its files": ({"dtype": "auto"}, {}),
    "in float32": ({"dtype": torch.float32}, {}),
    "with little memory": ({"low_cpu_mem_usage": True}, {}),
    "without mmap": ({"disable_mmap": True}, {}),
    "with mmap": ({"disable_mmap": False}, {}),
    "onto a device": ({"device_map": "cpu"}, {}),
    "one after the other": ({}, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_transformers_loads_the_same_tensors(loadable: Loadable, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    options, variables = WAYS[way]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected: Any = AutoModelForCausalLM.from_pretrained(loadable.materialized, **options)
    for directory in (loadable.mounted, loadable.linked):
        found: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
        assert found.dtype == expected.dtype
        assert differing(found.state_dict(), expected.state_dict()) == {}


@pytest.mark.heavy
def test_transformers_4_loads_the_same_tensors_from_files_side_by_side(loadable: Loadable, tmp_path: Path) -> None:
    assert (OLD_TRANSFORMERS / ".mergefs").exists(), f"{OLD_TRANSFORMERS} is not there: run scripts/test.sh --all"
    directories = (loadable.mounted, loadable.linked, loadable.materialized)
    outs = [tmp_path / f"{number}.safetensors" for number in range(len(directories))]
    words = [word for pair in zip(directories, outs, strict=True) for word in pair]
    variables = {"PYTHONPATH": str(OLD_TRANSFORMERS), "HF_ENABLE_PARALLEL_LOADING": "true"}
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "tests" / "old_transformers.py", *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = len(list(loadable.materialized.glob("*.safetensors")))
    assert done.stdout.split() == [str(files)] * len(directories)
    for out in outs:
        assert differing(load_file(out), load_model(loadable.materialized)) == {}


def test_a_state_dict_loads_without_a_mount(loadable: Loadable) -> None:
    """What is used where there is no FUSE."""
    state = mergefs.load_state_dict(loadable.recipe, device="cpu", catalog=loadable.catalog)
    config = LlamaConfig.from_pretrained(loadable.materialized)
    found: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    expected: Any = AutoModelForCausalLM.from_pretrained(loadable.materialized)
    assert differing(found.state_dict(), expected.state_dict()) == {}


def test_a_tokenizer_and_a_pipeline_say_the_same(loadable: Loadable) -> None:
    said = []
    for directory in (loadable.mounted, loadable.linked, loadable.materialized):
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        generate: Any = pipeline("text-generation", model=str(directory), device="cpu")
        said.append((tokenizer(SENTENCE)["input_ids"], generate(SENTENCE, max_new_tokens=6, do_sample=False)))
    assert said[0] == said[1] == said[2]
    assert said[0][1][0]["generated_text"].startswith(SENTENCE)


# -- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_safetensors_reads_the_same_with_either_backend(loadable: Loadable, backend: str) -> None:
    for mounted, materialized in loadable.weights():
        assert differing(load_file(mounted, backend=backend), load_file(materialized)) == {}
        with safe_open(mounted, "pt", backend=backend) as found, safe_open(materialized, "pt") as expected:
            assert found.metadata() == expected.metadata()
            assert list(found.keys()) == list(expected.keys())
            for name in expected.keys():  # noqa: SIM118 - not a dict
                assert torch.equal(found.get_slice(name)[1:3], expected.get_slice(name)[1:3])


# -- loaders that read past the page cache, with many threads ----------------------------------------------------------


def stream_with_run_ai(paths: list[str]) -> dict[str, torch.Tensor]:
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def load_with_fastsafetensors(paths: list[str]) -> dict[str, torch.Tensor]:
    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: paths})
    buffer = loader.copy_files_to_device()
    try:
        return {name: buffer.get_tensor(name).clone() for name in loader.get_keys()}
    finally:
        buffer.close()
        loader.close()


@pytest.mark.parametrize("load", [stream_with_run_ai, load_with_fastsafetensors])
def test_a_streamer_loads_the_same_tensors(
    loadable: Loadable, load: Callable[[list[str]], dict[str, torch.Tensor]]
) -> None:
    """Both open files with O_DIRECT where a file system lets them, as a mount does."""
    for directory in (loadable.mounted, loadable.linked):
        found = load([str(path) for path in sorted(directory.glob("*.safetensors"))])
        assert differing(found, load_model(loadable.materialized)) == {}


def read_direct(path: Path, threads: int, block: int) -> bytes:
    """Read a file as streamers do: threads with aligned buffers of ``block`` bytes and O_DIRECT, each its own part."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def part(offset: int) -> bytes:
        with mmap.mmap(-1, block) as buffer:
            count = os.preadv(descriptor, [buffer], offset)
            assert count == min(block, size - offset)
            return buffer[:count]

    try:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return b"".join(pool.map(part, range(0, size, block)))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("block", [PAGE, 16 * PAGE])
def test_threads_read_past_the_page_cache(loadable: Loadable, block: int) -> None:
    for mounted, materialized in loadable.weights():
        assert read_direct(mounted, 8, block) == materialized.read_bytes()


def test_one_call_reads_into_many_buffers(loadable: Loadable) -> None:
    for mounted, materialized in loadable.weights():
        expected = materialized.read_bytes()
        sizes = [1, 7, 4096, 3, len(expected)]
        buffers = [bytearray(size) for size in sizes]
        descriptor = os.open(mounted, os.O_RDONLY)
        try:
            assert os.preadv(descriptor, buffers, 11) == len(expected) - 11
        finally:
            os.close(descriptor)
        assert b"".join(buffers).startswith(expected[11:])


# -- huggingface_hub --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mounted", "linked"])
def test_a_mount_is_uploaded_to_the_hub_as_the_materialized_directory_would_be(loadable: Loadable, kind: str) -> None:
    directory: Path = getattr(loadable, kind)
    code = (
        "import sys; from huggingface_hub import HfApi\n"
        "HfApi().upload_folder(repo_id='me/merged', folder_path=sys.argv[1], token='hf_token')\n"
    )
    with fake_uploads() as uploads:
        variables = {"HF_ENDPOINT": uploads.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code, directory]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = {p.name: p.read_bytes() for p in loadable.materialized.iterdir() if p.name != MANIFEST_NAME}
    assert uploads.files == expected
    assert any(len(pieces) > 1 for pieces in uploads.pieces.values())
