"""``mergefs log``: what models were made of, also when they were moved or their directories tell nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, family
from mounting import mounted_recipes
from msgspec.structs import replace
from recipes import MERGES, write_document, write_recipe
from sentences import said_by

from mergefs.catalog import Catalog
from mergefs.materialize.manifest import read_manifest

LINEAR = MERGES["linear without a base"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=1)


@pytest.fixture
def generations(models: Family, tmp_path: Path) -> tuple[Path, Path]:
    """A model made of models, and one made of that."""
    first = write_recipe(tmp_path / "first.yml", MERGES["ties"], models)
    assert said_by("materialize", first, tmp_path / "first").status == 0
    second = write_recipe(tmp_path / "second.yml", LINEAR, Family(models.base, (tmp_path / "first", models.base)))
    assert said_by("materialize", second, tmp_path / "second").status == 0
    return tmp_path / "first", tmp_path / "second"


def logged(*target: str | Path) -> Any:
    said = said_by("log", "--json", *target)
    assert said.status == 0, said.stderr
    return json.loads(said.stdout)


def refused(*target: str | Path) -> str:
    said = said_by("log", *target)
    assert (said.status, said.stdout) == (1, ""), said
    return said.stderr


def transaction_of(directory: Path) -> str:
    with Catalog(Path(os.environ["MERGEFS_CATALOG"])) as catalog:
        return next(one.transaction_id for one in catalog.transactions() if one.destination == str(directory))


def test_a_directory_tells_its_whole_lineage(generations: tuple[Path, Path], models: Family) -> None:
    first, second = generations
    found = logged(second)
    assert (found["plan_id"], found["method"]) == (read_manifest(second).whole_id, "linear")
    assert [run["destination"] for run in found["runs"]] == [str(second)]
    inner, base = found["inputs"]
    assert (inner["name"], inner["identity"]) == (str(first), read_manifest(first).content)
    assert (inner["plan_id"], inner["method"]) == (read_manifest(first).whole_id, "ties")
    assert [entry["name"] for entry in inner["inputs"]] == [str(path) for path in (*models.experts, models.base)]
    assert (base["name"], base["role"], base["inputs"]) == (str(models.base), "expert", [])


def test_people_see_a_tree(generations: tuple[Path, Path], models: Family) -> None:
    first, second = generations
    lines = said_by("log", second).stdout.splitlines()
    assert lines[0].startswith(f"{second}  (plan {read_manifest(second).whole_id}, linear)")
    assert lines[1].startswith("│ committed 20")
    assert lines[2].startswith(f"├─ {first}  (expert, plan ")
    assert lines[3].startswith(f"│  ├─ {models.experts[0]}  (expert, contents ")
    assert lines[5].startswith(f"│  └─ {models.base}  (base, contents ")
    assert lines[6].startswith(f"└─ {models.base}  (expert, contents ")


def test_a_plan_and_a_run_are_found_by_their_ids_or_how_they_begin(generations: tuple[Path, Path]) -> None:
    _, second = generations
    plan_id, run = read_manifest(second).whole_id, transaction_of(second)
    whole = logged(second)
    for target in (plan_id, plan_id[:16], plan_id[:8], run, run[:8]):
        found = logged(target)
        assert (found["plan_id"], found["inputs"]) == (plan_id, whole["inputs"])
    assert logged(run)["name"] == str(second)


def test_models_that_were_moved_tell_the_same(generations: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = generations
    before = logged(second)
    first.rename(tmp_path / "first elsewhere")
    second.rename(tmp_path / "second elsewhere")
    after = logged(tmp_path / "second elsewhere")
    assert after["inputs"] == before["inputs"]
    assert [run["destination"] for run in after["runs"]] == [str(second)]


def test_another_machine_knows_what_the_model_tells(generations: tuple[Path, Path], tmp_path: Path) -> None:
    _, second = generations
    before = logged(second)
    said = said_by("--catalog", tmp_path / "another", "log", "--json", second)
    assert json.loads(said.stdout) == before | {"runs": []}


def test_a_model_without_its_files_is_known_by_its_contents(generations: tuple[Path, Path], tmp_path: Path) -> None:
    """Only weights and config.json were copied, as some tools do; the copy has been analysed."""
    first, _ = generations
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(first / name, tmp_path / "bare" / name)
    assert "so that it is known by its contents" in refused(tmp_path / "bare")
    recipe = write_document(
        tmp_path / "r.yml", {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "bare")}]}
    )
    assert said_by("materialize", recipe, tmp_path / "third").status == 0
    found = logged(tmp_path / "bare")
    assert (found["plan_id"], found["method"]) == (read_manifest(first).whole_id, "ties")
    assert logged(tmp_path / "third")["inputs"][0]["inputs"] == found["inputs"]


def test_a_plan_whose_models_are_gone_is_told_from_the_catalog(generations: tuple[Path, Path], models: Family) -> None:
    first, second = generations
    plan_id = read_manifest(second).whole_id
    shutil.rmtree(second)
    shutil.rmtree(first)
    found = logged(plan_id)
    assert found["method"] == "linear"
    assert [entry["name"] for entry in found["inputs"]] == [str(first), str(models.base)]
    assert found["inputs"][0]["method"] == "ties"
    assert [entry["name"] for entry in found["inputs"][0]["inputs"]] == [
        str(path) for path in (*models.experts, models.base)
    ]


def test_merges_within_one_recipe_are_told_apart(models: Family, tmp_path: Path) -> None:
    inner = {
        "name": "inner",
        "merge_method": "linear",
        "models": [{"model": str(expert), "parameters": {"weight": 0.5}} for expert in models.experts],
    }
    outer = {
        "merge_method": "slerp",
        "base_model": str(models.base),
        "models": [{"model": "inner"}],
        "parameters": {"t": 0.5},
    }
    recipe = write_document(tmp_path / "recipe.yml", [inner, outer])
    assert said_by("materialize", recipe, tmp_path / "out").status == 0
    nested = next(entry for entry in logged(tmp_path / "out")["inputs"] if entry["name"] == "inner")
    assert [entry["name"] for entry in nested["inputs"]] == list(map(str, models.experts))


def test_a_mounted_model_tells_its_lineage(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state"):
        found = logged(tmp_path / "mnt")
        assert found["plan_id"].startswith("local-")
        assert said_by("materialize", recipe, tmp_path / "out").status == 0
        written = logged(tmp_path / "out")
        asked = read_manifest(tmp_path / "out").plan_id
        assert logged(asked) == written | {
            "name": str(recipe)
        }  # and not the plan that the mount shows, of the same half
        assert logged(found["plan_id"])["runs"] == []
    assert (found["method"], found["plan_id"].removeprefix("local-")[:16]) == ("ties", asked)
    assert len(found["inputs"]) == 3


def test_a_mounted_model_is_told_what_the_catalog_knows_of_the_contents_of_its_inputs(
    generations: tuple[Path, Path], tmp_path: Path
) -> None:
    """A bare copy of a written model, which is mounted as the input of another."""
    first, _ = generations
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(first / name, tmp_path / "bare" / name)
    recipe = write_document(
        tmp_path / "r.yml", {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "bare")}]}
    )
    assert said_by("analyze", tmp_path / "bare").status == 0
    catalog = {"MERGEFS_CATALOG": os.environ["MERGEFS_CATALOG"]}
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", extra=catalog):
        (found,) = logged(tmp_path / "mnt")["inputs"]
    assert (found["plan_id"], found["method"]) == (read_manifest(first).whole_id, "ties")


def test_every_run_is_listed_the_latest_first(generations: tuple[Path, Path]) -> None:
    first, second = generations
    assert [run["destination"] for run in logged()] == [str(second), str(first)]
    shown = said_by("log").stdout
    assert shown.index(str(second)) < shown.index(transaction_of(first))


def test_nothing_written_is_nothing_listed() -> None:
    assert said_by("log").stdout == "no model has been written by `mergefs materialize`\n"
    assert logged() == []


def test_what_nobody_knows_is_refused_in_a_sentence(models: Family, tmp_path: Path) -> None:
    assert "is neither a directory nor the id of a plan or a run" in refused("0123456789")
    assert "is neither a directory nor the id of a plan or a run" in refused("01")
    assert "has no mergefs.json, and nothing in" in refused(models.base)
    assert "has no mergefs.json, and is no model" in refused(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "mergefs.json").write_text("{")
    assert "mergefs.json: cannot be read" in refused(tmp_path / "broken")


def test_a_beginning_that_several_have_is_refused(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    assert said_by("materialize", "--no-verify-reads", recipe, tmp_path / "first").status == 0
    with Catalog(Path(os.environ["MERGEFS_CATALOG"])) as catalog:
        (record,) = catalog.transactions()
        for end in ("1", "2"):
            changed = replace(record, transaction_id="f" * 31 + end)
            catalog.keep_transaction(changed)
    assert f"begins several ids: {'f' * 31}1, {'f' * 31}2; write out more of it" in refused("ffffffff")
