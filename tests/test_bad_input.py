"""Bad input gets one sentence that names file, key and remedy, exit status 1, and leaves nothing behind."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from bad_inputs import (
    PROJECTION,
    WEIGHTS,
    add_a_tensor,
    announce_a_huge_header,
    announce_more_header_than_there_is,
    append_bytes,
    break_the_config,
    contradict_a_shape,
    declare,
    drop_a_tensor,
    empty,
    index_pickles,
    invent_a_dtype,
    leave_a_hole,
    lose_a_shard,
    name_a_tensor_twice,
    overlap_two_tensors,
    pack,
    pickle_the_weights,
    put_an_adapter,
    quantise_to_fp8,
    remove_the_config,
    set_element,
    transpose_a_tensor,
    truncate,
    write_something_else,
)
from checkpoints import Family, family
from mounting import mounted_recipes, run_mergefs
from recipes import MERGES, recipe_document, write_document, write_recipe
from sentences import the_sentence

from mergefs.cli import main
from mergefs.mount.mountinfo import all_mounts


@dataclass(frozen=True, slots=True)
class Workspace:
    """A family, a recipe for it, and room to mount or write the merge."""

    directory: Path
    family: Family
    recipe: Path

    @property
    def expert(self) -> Path:
        """The model that the tests spoil."""
        return self.family.experts[1]

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    @property
    def output(self) -> Path:
        return self.directory / "out"

    def say(self, **changes: Any) -> Path:
        """Write the recipe again with changed top-level keys (None removes one)."""
        document = recipe_document(MERGES["ties"], self.family) | changes
        return write_document(self.recipe, {key: value for key, value in document.items() if value is not None})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    (tmp_path / "mnt").mkdir()
    return Workspace(tmp_path, made, write_recipe(tmp_path / "recipe.yml", MERGES["ties"], made))


def everything_below(directory: Path) -> dict[Path, tuple[int, int, int]]:
    """Return what could be seen to have changed of each entry."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[path] = (status.st_mode, size, status.st_ino)
    return found


def processes_about(directory: Path) -> list[str]:
    """Return the command lines of other processes that name ``directory``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(directory) in line:
                    found.append(line)
    return found


@contextlib.contextmanager
def nothing_left_behind(directory: Path) -> Iterator[None]:
    """Fail when files, mounts or processes below ``directory`` are others afterwards."""
    entries, mounts = everything_below(directory), [m for m in all_mounts() if m.mountpoint.is_relative_to(directory)]
    yield
    assert everything_below(directory) == entries
    assert [m for m in all_mounts() if m.mountpoint.is_relative_to(directory)] == mounts
    assert processes_about(directory) == []


@pytest.fixture
def refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command in this process, which must fail, and returns its sentence."""

    def run(*arguments: str | Path, status: int = 1) -> str:
        capfd.readouterr()
        with nothing_left_behind(tmp_path):
            code = main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return the_sentence(code, shown.out, shown.err, status)

    return run


@pytest.fixture
def real_refusal(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """As ``refusal``, but by the real command line in a process of its own."""
    state = tmp_path_factory.mktemp("state")

    def run(*arguments: str | Path, extra: dict[str, str] | None = None) -> str:
        with nothing_left_behind(tmp_path):
            result = run_mergefs(*arguments, state=state, extra=extra)
        return the_sentence(result.returncode, result.stdout, result.stderr)

    return run


Refusal = Callable[..., str]

# Recipes --------------------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str | dict[str, Any], str]] = {
    "no YAML": ("models: [\n  {model: a", r"recipe.yml:2: is not valid YAML"),
    "a list": ("- a\n- b\n", r"mapping"),
    "empty": ("", r"empty|mapping|nothing"),
    "not text": ("\x00\x01", r"."),
    "an unknown method": ({"merge_method": "tiez"}, r"'tiez'.*ties"),
    "no method": ({"merge_method": None}, r"merge_method"),
    "an unknown key": ({"base_modle": "a"}, r"'base_modle'.*'base_model'"),
    "an unknown parameter": ({"parameters": {"lamda": 1.0}}, r"'lamda'.*lambda"),
    "a dtype that is none": ({"dtype": "float12"}, r"'dtype'.*'float12'"),
    "no models": ({"models": []}, r"'models' is empty"),
    "no base for a method that needs one": ({"base_model": None}, r"base_model"),
    "a model that is not there": ({"base_model": "/nowhere/model"}, r"'/nowhere/model'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe(workspace: Workspace, refusal: Refusal, name: str) -> None:
    change, named = RECIPES[name]
    if isinstance(change, str):
        workspace.recipe.write_text(change)
    else:
        workspace.say(**change)
    sentence = refusal("materialize", workspace.recipe, workspace.output)
    assert str(workspace.recipe) in sentence
    assert re.search(named, sentence), sentence


def test_a_recipe_that_is_not_there(workspace: Workspace, refusal: Refusal) -> None:
    assert str(workspace.directory / "none.yml") in refusal("plan", workspace.directory / "none.yml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "LONG"),
        ("analyze", "LONG"),
        ("materialize", "LONG", "out"),
        ("materialize", "recipe.yml", "LONG"),
        ("materialize", "recipe.yml", "LONG/out"),
    ],
)
def test_a_name_that_no_file_can_have(workspace: Workspace, refusal: Refusal, arguments: tuple[str, ...]) -> None:
    command, *names = arguments
    long = "n" * 300
    paths = [workspace.directory / name.replace("LONG", long) for name in names]
    sentence = refusal(command, *paths)
    assert long in sentence
    assert os.strerror(errno.ENAMETOOLONG) in sentence


@pytest.mark.parametrize("command", ["plan", "analyze", "materialize"])
def test_a_recipe_in_a_directory_that_is_closed_to_the_user(
    workspace: Workspace, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The system calls refuse, as they do for everybody but root."""
    closed = workspace.directory / "closed"

    def refuse(call: Callable[..., Any]) -> Callable[..., Any]:
        def refused(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(closed):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *arguments, **options)

        return refused

    for owner, name in ((os, "stat"), (os, "lstat"), (io, "open")):
        monkeypatch.setattr(owner, name, refuse(getattr(owner, name)))
    out = [workspace.output] if command == "materialize" else []
    sentence = refusal(command, closed / "recipe.yml", *out)
    assert f"{closed / 'recipe.yml'}: cannot be read ({os.strerror(errno.EACCES)})" in sentence


def test_a_directory_without_recipes(workspace: Workspace, refusal: Refusal) -> None:
    assert str(workspace.mountpoint) in refusal("materialize", workspace.mountpoint, workspace.output)


# Models ---------------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, rf"{WEIGHTS} is cut off"),
    "longer than its header says": (append_bytes, rf"{WEIGHTS} has 4 bytes after"),
    "empty": (empty, rf"{WEIGHTS} has 0 bytes"),
    "a hole": (leave_a_hole, rf"{WEIGHTS} has a hole of 64 bytes .* tensor '"),
    "an overlap": (overlap_two_tensors, rf"{WEIGHTS} has an overlap of 64 bytes .* tensor '"),
    "a shape that lies": (contradict_a_shape, rf"{WEIGHTS} has tensor '.*' that needs 42 bytes"),
    "a dtype that is none": (invent_a_dtype, rf"{WEIGHTS} gives tensor '.*' the dtype 'F12'"),
    "a name twice": (name_a_tensor_twice, rf"{WEIGHTS} names tensor 'w' twice"),
    "a huge header": (announce_a_huge_header, rf"{WEIGHTS} announces a header of {2**40} bytes"),
    "a header beyond the file": (announce_more_header_than_there_is, rf"{WEIGHTS} announces a header of 5000 bytes"),
    "a pointer of git lfs": (write_something_else, rf"{WEIGHTS} announces a header"),
    "another shape": (transpose_a_tensor, r"'model.layers.1.mlp.down_proj.weight' is \[64, 32\] .* \[32, 64\]"),
    "a tensor less": (drop_a_tensor, r"lacks tensor 'model.layers.1.mlp.up_proj.weight'.* may be missing"),
    "a tensor more": (add_a_tensor, r"has tensor 'model.extra.weight'"),
    "no config": (remove_the_config, r"config.json"),
    "a broken config": (break_the_config, r"config.json is no JSON"),
    "a lost shard": (lose_a_shard, r"lacks model-00002-of-00002.safetensors"),
    "FP8 by its tensors": (quantise_to_fp8, rf"FP8 .*'{PROJECTION}.weight'.* '{PROJECTION}.weight_scale_inv'"),
    "FP8 by its config": (declare("fp8"), r"FP8 .*config.json"),
    "GPTQ by its tensors": (pack(columns=32, with_group_index=True), rf"GPTQ .*'{PROJECTION}\.q"),
    "GPTQ by its config": (declare("gptq"), r"GPTQ .*config.json"),
    "AWQ by its tensors": (pack(columns=4, with_group_index=False), rf"AWQ .*'{PROJECTION}\.q"),
    "AWQ by its config": (declare("awq"), r"AWQ .*config.json"),
    "pickles": (pickle_the_weights, r"pytorch_model.bin holds pickled weights, .* unpickling runs code"),
    "pickles in the index": (index_pickles, r"pytorch_model-00001-of-00002.bin holds pickled weights"),
    "an adapter": (put_an_adapter, r"an adapter \(adapter_model.safetensors\)"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_expert(workspace: Workspace, refusal: Refusal, name: str) -> None:
    spoil, named = MODELS[name]
    spoil(workspace.expert)
    sentence = refusal("materialize", workspace.recipe, workspace.output)
    assert str(workspace.expert) in sentence
    assert re.search(named, sentence), sentence


@pytest.mark.parametrize("name", ["truncated", "a hole", "another shape", "FP8 by its tensors", "pickles"])
def test_a_bad_expert_at_the_mount(workspace: Workspace, real_refusal: Refusal, name: str) -> None:
    spoil, named = MODELS[name]
    spoil(workspace.expert)
    sentence = real_refusal("mount", workspace.recipe, workspace.mountpoint)
    assert str(workspace.expert) in sentence
    assert re.search(named, sentence), sentence
    assert list(workspace.mountpoint.iterdir()) == []


@pytest.mark.parametrize("name", ["truncated", "a name twice", "GPTQ by its tensors"])
@pytest.mark.parametrize("command", ["plan", "analyze"])
def test_a_bad_expert_of_other_commands(workspace: Workspace, refusal: Refusal, command: str, name: str) -> None:
    spoil, named = MODELS[name]
    spoil(workspace.expert)
    assert re.search(named, refusal(command, workspace.recipe))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_unreadable_expert(
    workspace: Workspace, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.open

    def opening(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(os.fsdecode(path)) == workspace.expert / WEIGHTS:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", opening)  # permissions mean nothing to root
    sentence = refusal("materialize", workspace.recipe, workspace.output)
    assert str(workspace.expert / WEIGHTS) in sentence
    assert os.strerror(number) in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", [["materialize"], ["materialize", "--budget", "50%"], ["analyze"]])
def test_a_value_that_no_merge_can_be_right_with(
    workspace: Workspace, refusal: Refusal, command: list[str], value: float
) -> None:
    set_element(workspace.expert, f"{PROJECTION}.weight", value)
    rest = [workspace.recipe, workspace.output] if command[0] == "materialize" else [workspace.recipe]
    sentence = refusal(*command, *rest)
    assert f"tensor '{PROJECTION}.weight'" in sentence
    assert str(workspace.expert / WEIGHTS) in sentence


def test_a_value_that_no_merge_can_be_right_with_in_a_model_that_is_analysed_alone(
    workspace: Workspace, refusal: Refusal
) -> None:
    set_element(workspace.expert, f"{PROJECTION}.weight", float("nan"))
    assert f"tensor '{PROJECTION}.weight'" in refusal("analyze", workspace.expert)


# Budgets and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["-5%", "120%", "lots", "", "%", "nan%", "5 parsecs", "-1", "1e3"])
@pytest.mark.parametrize("command", ["plan", "materialize"])
def test_a_budget_that_is_none(workspace: Workspace, refusal: Refusal, command: str, budget: str) -> None:
    rest = [workspace.output] if command == "materialize" else []
    assert repr(budget) in refusal(command, "--budget", budget, workspace.recipe, *rest)


def test_a_budget_without_anything_to_stand_in(workspace: Workspace, refusal: Refusal) -> None:
    write_recipe(workspace.recipe, MERGES["linear without a base"], workspace.family)
    sentence = refusal("materialize", "--budget", "25%", workspace.recipe, workspace.output)
    assert str(workspace.recipe) in sentence
    assert "name a model with --base" in sentence


@pytest.mark.parametrize("base", ["nowhere", "."])
def test_a_stand_in_that_is_no_model(workspace: Workspace, refusal: Refusal, base: str) -> None:
    write_recipe(workspace.recipe, MERGES["linear without a base"], workspace.family)
    base = str(workspace.directory / base)
    assert base in refusal("materialize", "--budget", "25%", "--base", base, workspace.recipe, workspace.output)


def test_a_cache_that_is_too_small_is_wrong_usage(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = tmp_path_factory.mktemp("state")
    with nothing_left_behind(workspace.directory):
        result = run_mergefs("mount", "--cache-size", "1MiB", workspace.recipe, workspace.mountpoint, state=state)
    assert "--cache-size" in the_sentence(result.returncode, result.stdout, result.stderr, expected_status=2)


# Mount points ---------------------------------------------------------------------------------------------------------


def test_a_mount_point_that_does_not_exist(workspace: Workspace, real_refusal: Refusal) -> None:
    sentence = real_refusal("mount", workspace.recipe, workspace.directory / "none")
    assert f"{workspace.directory / 'none'} does not exist; make it with" in sentence


def test_a_mount_point_that_is_a_file(workspace: Workspace, real_refusal: Refusal) -> None:
    assert f"{workspace.recipe} is not a directory" in real_refusal("mount", workspace.recipe, workspace.recipe)


def test_a_mount_point_that_is_not_empty(workspace: Workspace, real_refusal: Refusal) -> None:
    (workspace.mountpoint / "mine").write_text("mine")
    assert f"{workspace.mountpoint} is not empty" in real_refusal("mount", workspace.recipe, workspace.mountpoint)


def test_a_mount_point_that_is_mounted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    state = tmp_path_factory.mktemp("state")
    with mounted_recipes(workspace.recipe, mountpoint=workspace.mountpoint, state=state):
        before = sorted(workspace.mountpoint.iterdir())
        result = run_mergefs("mount", workspace.recipe, workspace.mountpoint, state=state)
        sentence = the_sentence(result.returncode, result.stdout, result.stderr)
        assert f"{workspace.mountpoint} is already a mount of mergefs; run `mergefs umount" in sentence
        assert sorted(workspace.mountpoint.iterdir()) == before


def test_a_mount_point_with_a_source_in_it(workspace: Workspace, real_refusal: Refusal) -> None:
    inner = workspace.mountpoint / "models"
    workspace.expert.parent.rename(inner)
    moved = Family(inner / "base", tuple(inner / expert.name for expert in workspace.family.experts))
    write_recipe(workspace.recipe, MERGES["ties"], moved)
    sentence = real_refusal("mount", workspace.recipe, workspace.mountpoint)
    assert str(workspace.mountpoint) in sentence


def test_a_mount_point_in_a_source(workspace: Workspace, real_refusal: Refusal) -> None:
    (workspace.expert / "mnt").mkdir()
    sentence = real_refusal("mount", workspace.recipe, workspace.expert / "mnt")
    assert f"{workspace.expert / 'mnt'} lies inside the source {workspace.expert}" in sentence


def test_a_mount_point_that_would_hide_the_catalog(workspace: Workspace, real_refusal: Refusal) -> None:
    catalog = workspace.mountpoint / "catalog"
    sentence = real_refusal("--catalog", catalog, "mount", workspace.recipe, workspace.mountpoint)
    assert f"the catalog {catalog} lies inside the mount point {workspace.mountpoint}" in sentence
    assert not catalog.exists()


# The catalog ----------------------------------------------------------------------------------------------------------


def catalog_of(workspace: Workspace) -> Path:
    """Return a catalog that knows the recipe's plan."""
    path = workspace.directory / "catalog"
    assert main(["--catalog", str(path), "plan", "--budget", "50%", str(workspace.recipe)]) == 0
    return path


def test_a_catalog_of_a_newer_version(workspace: Workspace, refusal: Refusal) -> None:
    path = catalog_of(workspace)
    with lmdb.open(str(path), max_dbs=16) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"format", b"99", db=environment.open_db(b"meta", transaction))
    sentence = refusal("--catalog", path, "plan", workspace.recipe)
    assert str(path) in sentence
    assert "format '99'" in sentence
    assert "use the mergefs that made it" in sentence


def used_bytes(file: Path) -> int:
    """Return the bytes of the pages that LMDB has used of its data file, which is longer."""
    with lmdb.open(str(file.parent), readonly=True, lock=False) as environment:
        return (int(environment.info()["last_pgno"]) + 1) * int(environment.stat()["psize"])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "garbage": lambda file: file.write_bytes(os.urandom(file.stat().st_size)),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "text": lambda file: file.write_text("this is no catalog\n" * 1000),
    "half": lambda file: os.truncate(file, used_bytes(file) // 2),
    "one page": lambda file: os.truncate(file, 4096),
    "two pages": lambda file: os.truncate(file, 8192),
    "a few bytes": lambda file: file.write_bytes(b"few"),
}


@pytest.mark.parametrize("command", ["plan", "mount"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_catalog(workspace: Workspace, real_refusal: Refusal, damage: str, command: str) -> None:
    path = catalog_of(workspace)
    DAMAGES[damage](path / "data.mdb")
    rest = [workspace.mountpoint] if command == "mount" else []
    sentence = real_refusal("--catalog", path, command, workspace.recipe, *rest)
    assert str(path) in sentence
    assert "everything in it can be rebuilt" in sentence


def test_damaged_records(workspace: Workspace, refusal: Refusal) -> None:
    path = catalog_of(workspace)
    with lmdb.open(str(path), max_dbs=16) as environment, environment.begin(write=True) as transaction:
        table = environment.open_db(b"deltas", transaction)
        for key in [bytes(key) for key, _ in transaction.cursor(table)]:
            transaction.put(key, b"\xc1damaged", db=table)
    sentence = refusal("--catalog", path, "plan", "--budget", "30%", workspace.recipe)
    assert str(path) in sentence
    assert "'deltas' is damaged" in sentence


@contextlib.contextmanager
def small_disk(path: Path, *options: str) -> Iterator[Path]:
    """Lend a file system of one MiB in memory."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("size=1m", *options)), "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


def test_a_catalog_on_a_read_only_disk(workspace: Workspace, real_refusal: Refusal) -> None:
    with small_disk(workspace.directory / "disk", "ro") as disk:
        sentence = real_refusal("--catalog", disk / "catalog", "plan", workspace.recipe)
    assert str(disk / "catalog") in sentence
    assert "make it writable, or name another directory with --catalog" in sentence


def test_a_catalog_below_a_file(workspace: Workspace, real_refusal: Refusal) -> None:
    sentence = real_refusal("--catalog", workspace.recipe / "catalog", "plan", workspace.recipe)
    assert str(workspace.recipe / "catalog") in sentence


def test_a_catalog_on_a_full_disk(workspace: Workspace, real_refusal: Refusal) -> None:
    with small_disk(workspace.directory / "disk") as disk:
        (disk / "catalog").mkdir()
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        result = run_mergefs(
            "--catalog", disk / "catalog", "plan", workspace.recipe, state=workspace.directory / "state"
        )
    assert str(disk / "catalog") in the_sentence(result.returncode, result.stdout, result.stderr)


# Destinations ---------------------------------------------------------------------------------------------------------


def test_a_destination_that_is_not_empty(workspace: Workspace, refusal: Refusal) -> None:
    workspace.output.mkdir()
    (workspace.output / "mine").write_text("mine")
    sentence = refusal("materialize", workspace.recipe, workspace.output)
    assert f"{workspace.output}: exists and is not empty" in sentence


def test_a_destination_that_is_a_file(workspace: Workspace, refusal: Refusal) -> None:
    sentence = refusal("materialize", "--overwrite", workspace.recipe, workspace.recipe)
    assert f"{workspace.recipe}: is not a directory" in sentence


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("place", ["models/expert-2", "models/expert-2/out", "models/base", "models"])
def test_a_destination_that_is_tangled_with_a_source(
    workspace: Workspace, refusal: Refusal, place: str, overwrite: list[str]
) -> None:
    destination = workspace.directory / place
    sentence = refusal("materialize", *overwrite, workspace.recipe, destination)
    assert str(destination) in sentence
    assert "the source" in sentence


def test_a_destination_that_holds_the_recipe(workspace: Workspace, refusal: Refusal) -> None:
    place = workspace.directory / "recipes"
    recipe = write_recipe(place / "recipe.yml", MERGES["ties"], workspace.family)
    (place / "config.json").write_text("{}")
    assert str(recipe) in refusal("materialize", "--overwrite", recipe, place)


def test_a_destination_that_holds_the_catalog(workspace: Workspace, refusal: Refusal) -> None:
    catalog = catalog_of(workspace)
    (workspace.directory / "place").mkdir()
    catalog.rename(workspace.directory / "place" / "catalog")
    (workspace.directory / "place" / "config.json").write_text("{}")
    place = workspace.directory / "place"
    sentence = refusal("--catalog", place / "catalog", "materialize", "--overwrite", workspace.recipe, place)
    assert str(place / "catalog") in sentence


def test_only_models_are_overwritten(workspace: Workspace, refusal: Refusal) -> None:
    workspace.output.mkdir()
    (workspace.output / "thesis.tex").write_text("years of work")
    assert str(workspace.output) in refusal("materialize", "--overwrite", workspace.recipe, workspace.output)


def test_a_disk_that_is_too_small(workspace: Workspace, refusal: Refusal) -> None:
    with small_disk(workspace.directory / "disk") as disk:
        sentence = refusal("materialize", workspace.recipe, disk / "out")
        assert f"{disk / 'out'}: needs" in sentence
        assert "free some space" in sentence
        assert list(disk.iterdir()) == []


def test_a_destination_on_a_read_only_disk(workspace: Workspace, refusal: Refusal) -> None:
    with small_disk(workspace.directory / "disk", "ro") as disk:
        sentence = refusal("materialize", workspace.recipe, disk / "out")
    assert str(disk) in sentence
    assert os.strerror(errno.EROFS) in sentence


# Written models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(workspace: Workspace) -> Path:
    assert main(["materialize", str(workspace.recipe), str(workspace.output)]) == 0
    return workspace.output


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


VERIFICATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda directory: flip_a_byte(directory / WEIGHTS), rf"{WEIGHTS}: is damaged"),
    "a flipped bit in a small file": (
        lambda directory: flip_a_byte(directory / "config.json"),
        r"config.json: is damaged",
    ),
    "a shorter file": (lambda directory: os.truncate(directory / WEIGHTS, 1000), rf"{WEIGHTS}: has 1000 bytes"),
    "a missing file": (lambda directory: (directory / WEIGHTS).unlink(), rf"{WEIGHTS}: cannot be read"),
    "a file too many": (
        lambda directory: shutil.copy(directory / WEIGHTS, directory / "more.safetensors"),
        r"more.safetensors: is not in mergefs.manifest.json",
    ),
    "no manifest": (lambda directory: (directory / "mergefs.manifest.json").unlink(), r"mergefs.manifest.json: cannot"),
    "a broken manifest": (
        lambda directory: (directory / "mergefs.manifest.json").write_text("{"),
        r"mergefs.manifest.json: is damaged",
    ),
    "a manifest that leaves the directory": (
        lambda directory: (directory / "mergefs.manifest.json").write_text(
            (directory / "mergefs.manifest.json").read_text().replace('"config.json"', '"../recipe.yml"')
        ),
        r"mergefs.manifest.json: .*'\.\./recipe.yml'",
    ),
    "a manifest of a newer format": (
        lambda directory: (directory / "mergefs.manifest.json").write_text(
            (directory / "mergefs.manifest.json").read_text().replace('"format": 5', '"format": 6')
        ),
        r"mergefs.manifest.json: has format 6",
    ),
}


@pytest.mark.parametrize("deep", [[], ["--deep"]])
@pytest.mark.parametrize("name", VERIFICATIONS)
def test_a_written_model_that_is_not_as_it_was_written(
    written: Path, refusal: Refusal, name: str, deep: list[str]
) -> None:
    spoil, named = VERIFICATIONS[name]
    spoil(written)
    sentence = refusal("verify", *deep, written)
    assert str(written) in sentence
    assert re.search(named, sentence), sentence


def test_a_directory_that_mergefs_did_not_write(workspace: Workspace, refusal: Refusal) -> None:
    assert str(workspace.expert) in refusal("verify", workspace.expert)


def test_verification_from_where_relative_paths_mean_nothing(
    workspace: Workspace, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.directory)
    document = recipe_document(MERGES["ties"], workspace.family)
    text = json.dumps(document).replace(f"{workspace.directory}/", "./")
    (workspace.directory / "relative.yml").write_text(text)
    assert main(["materialize", "relative.yml", "out"]) == 0
    assert main(["verify", "--deep", "out"]) == 0
    monkeypatch.chdir(workspace.mountpoint)
    sentence = refusal("verify", "--deep", workspace.output)
    assert "'./models/expert-1' was not found at " in sentence
    assert "try again from where the model was written" in sentence


def test_verification_against_other_sources(workspace: Workspace, written: Path, refusal: Refusal) -> None:
    set_element(workspace.expert, f"{PROJECTION}.weight", 5.0)
    sentence = refusal("verify", "--deep", written)
    assert re.search(rf"{WEIGHTS}: byte \d+ \(piece \d+\) differs .* in tensor '{PROJECTION}.weight'", sentence), (
        sentence
    )
    assert main(["verify", str(written)]) == 0  # the files themselves are as they were written
