"""Several models in one run: each is a transaction of its own, and what they have in common is read once."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import strace
import torch
from checkpoints import Family, family
from mounting import environment
from recipes import MERGES, write_recipe
from sentences import said_by

from mergefs.catalog import Catalog
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.engine.model_files import ModelFiles
from mergefs.errors import NonFiniteError
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.output import Output
from mergefs.materialize.sharing import Range
from mergefs.materialize.staging import locked
from mergefs.materialize.verify import verify

DENSITIES = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of 26 MiB each."""
    directory = tmp_path_factory.mktemp("models")
    return family(
        directory, experts=2, dtype=torch.bfloat16, tied=False, shards=1, hidden=512, layers=1, vocabulary=11000
    )


@pytest.fixture
def recipes(models: Family, tmp_path: Path) -> list[Path]:
    """Three merges of the same models."""
    names = ["ties", "task_arithmetic", "slerp"]
    return [write_recipe(tmp_path / f"{name}.yml", MERGES[name], models) for name in names]


@pytest.fixture
def alone(recipes: list[Path], tmp_path: Path) -> dict[str, str]:
    """The hash of each model's manifest, written by a run of its own with a catalog of its own."""
    found = {}
    for recipe in recipes:
        out = tmp_path / "alone" / recipe.stem
        assert said_by("--catalog", tmp_path / "another catalog", "materialize", recipe, out).status == 0
        found[recipe.stem] = manifest_hash(out) or ""
    return found


def states() -> list[str]:
    with Catalog(Path(os.environ["MERGEFS_CATALOG"])) as catalog:
        return sorted(record.state for record in catalog.transactions())


def test_each_model_is_what_a_run_of_its_own_writes(recipes: list[Path], alone: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = said_by("materialize", *recipes, out)
    assert said.status == 0, said.stderr
    assert {path.name: verify(path).manifest for path in out.iterdir()} == alone
    assert states() == ["committed"] * 3
    assert [line for line in said.stdout.splitlines() if line.startswith("wrote")] == [
        f"wrote          {out / recipe.stem}" for recipe in recipes
    ]


def test_blocks_of_the_inputs_are_read_once_for_all_variants(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "merge.yml", MERGES["ties"], models)
    variants = [tmp_path / f"merge.yml@density={density}" for density in DENSITIES]
    arguments = [sys.executable, "-m", "mergefs", "materialize", recipe, *variants, tmp_path / "out"]
    trace = strace.run(tmp_path / "log", arguments, environment(tmp_path / "state"))
    files = [directory / "model.safetensors" for directory in (models.base, *models.experts)]
    sizes = sum(path.stat().st_size for path in files)
    assert sizes * 0.99 < trace.total(files) < sizes * 1.01
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"merge", *(f"merge@density={density}" for density in DENSITIES)}
    assert len({manifest_hash(tmp_path / "out" / name) for name in names}) == len(names)


def test_a_model_that_cannot_be_written_does_the_others_no_harm(
    recipes: list[Path], alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ModelFiles.read_into

    def fail(files: ModelFiles, name: str, offset: int, view: memoryview) -> None:
        if files.plan.method.specification.name == "task_arithmetic" and offset > 0:
            raise NonFiniteError("the merge of a tensor has NaN in it; repair it")
        real(files, name, offset, view)

    monkeypatch.setattr(ModelFiles, "read_into", fail)
    said = said_by("materialize", *recipes, tmp_path / "out")
    assert said.status == 1
    assert "mergefs: error: the merge of a tensor has NaN in it" in said.stderr
    del alone["task_arithmetic"]
    assert {path.name: manifest_hash(path) for path in (tmp_path / "out").iterdir()} == alone
    assert states() == ["aborted", "committed", "committed"]


def test_what_is_seen_before_the_first_byte_keeps_all_from_being_written(recipes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "slerp").mkdir(parents=True)
    (tmp_path / "out" / "slerp" / "notes.txt").write_text("mine")
    said = said_by("materialize", *recipes, tmp_path / "out")
    assert said.status == 1
    assert f"{tmp_path / 'out' / 'slerp'}: exists and is not empty" in said.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slerp"]
    assert states() == ["aborted", "aborted"]


def test_a_destination_that_another_process_writes_to_keeps_all_from_being_written(
    recipes: list[Path], tmp_path: Path
) -> None:
    with locked(tmp_path / "out" / "slerp"):
        said = said_by("materialize", *recipes, tmp_path / "out")
    assert said.status == 1
    assert f"process {os.getpid()} is writing this model already" in said.stderr


def test_an_interruption_keeps_what_is_finished_of_all_and_resuming_goes_on_with_each(
    recipes: list[Path], alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Output.write

    def stop(output: Output, view: memoryview, offset: int, there: Sequence[Range] = ()) -> None:
        if offset >= 2 * len(view):
            raise KeyboardInterrupt
        real(output, view, offset, there)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", stop)
        said = said_by("materialize", *recipes, tmp_path / "out")
    assert said.status == 130
    for recipe in recipes:
        assert f"of {tmp_path / 'out' / recipe.stem} is kept in" in said.stderr
    said = said_by("materialize", "--resume", "--json", *recipes, tmp_path / "out")
    assert said.status == 0, said.stderr
    assert {path.name: manifest_hash(path) for path in (tmp_path / "out").iterdir()} == alone
    assert said.stdout.count('"reused_bytes": 0,') == 0
    said = said_by("materialize", "--resume", "--json", *recipes, tmp_path / "out")
    assert said.stdout.count('"already_there": true') == 3


def test_models_that_would_not_fit_together_are_not_begun(
    recipes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(
        tensor.nbytes for tensor in open_checkpoint(json.loads(recipes[0].read_text())["base_model"]).tensors.values()
    )
    real = os.statvfs

    def small(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = (2 * size + 40 * 2**20) // found[1]  # room for two of them
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", small)
    said = said_by("materialize", *recipes, tmp_path / "out")
    assert said.status == 1
    assert "free some space or choose another place" in said.stderr
    assert not (tmp_path / "out").exists()
    assert said_by("materialize", *recipes[:2], tmp_path / "out").status == 0
