"""A mount of several recipes shows them as they are now: added, edited, broken, removed, and varied by their path."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import Family, family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import Mount, mounted_recipes, run_mergefs, wait_for
from recipes import MERGES, recipe_document, write_document

import mergefs
from mergefs.engine.model_files import ModelFiles
from mergefs.errors import RecipeError
from mergefs.mount import shelf as shelf_module
from mergefs.mount.mountinfo import find_mount
from mergefs.mount.shelf import Shelf
from mergefs.mount.unmount import read_status
from mergefs.recipe.variants import Variant

pytestmark = pytest.mark.mounts

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=1)


class Recipes:
    """A directory of recipes, mounted."""

    def __init__(self, models: Family, directory: Path, mount: Mount) -> None:
        self.models = models
        self.directory = directory
        self.mount = mount
        self.root = mount.mountpoint
        self.catalog = directory.parent / "catalog"

    def write(self, name: str, **parameters: float) -> Path:
        """Write a task_arithmetic recipe whose experts have these parameters, complete in one step."""
        path = self.directory / f"{name}.yml"
        unfinished = write_document(self.directory / f"{name}.unfinished", document(self.models, **parameters))
        return unfinished.rename(path)

    def merged(self, path: Path, **options: str) -> bytes:
        """Return the weights of the merge of a recipe, made without the mount."""
        out = path.parent.parent / f"out-{path.stem}-{len(list(path.parent.parent.iterdir()))}"
        made = run_mergefs("materialize", path, out, *options.values(), state=out.parent / "state")
        assert made.returncode == 0, made.stderr
        return (out / WEIGHTS).read_bytes()

    def weights(self, name: str) -> bytes:
        """Return what the mount shows."""
        return (self.root / name / WEIGHTS).read_bytes()


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def document(models: Family, **parameters: float) -> dict[str, object]:
    made = recipe_document(MERGES["task_arithmetic"], models)
    for entry in made["models"]:
        entry["parameters"] |= parameters
    return made


@pytest.fixture
def recipes(models: Family, tmp_path: Path) -> Iterator[Recipes]:
    directory = tmp_path / "recipes"
    write_document(directory / "first.yml", document(models, weight=0.5))
    write_document(directory / "second.yml", document(models, weight=0.25))
    extra = {"MERGEFS_CATALOG": str(tmp_path / "catalog")}
    with mounted_recipes(directory, mountpoint=tmp_path / "mnt", state=tmp_path / "state", extra=extra) as mount:
        yield Recipes(models, directory, mount)


def test_each_recipe_is_a_link_to_the_directory_of_its_plan(recipes: Recipes) -> None:
    assert names_in(recipes.root) == ["first", "second"]
    for name in ("first", "second"):
        told = json.loads((recipes.root / name / "mergefs.json").read_text())
        plan_id = os.getxattr(recipes.root / name, "user.mergefs.plan_id").decode()
        assert (recipes.root / name).readlink() == Path(".plans") / plan_id
        assert plan_id.startswith(f"local-{told['plan_id']}")
        assert recipes.weights(name) == recipes.merged(recipes.directory / f"{name}.yml")


def test_an_edited_recipe_is_another_plan_while_readers_of_the_old_one_go_on(recipes: Recipes) -> None:
    before = recipes.merged(recipes.directory / "first.yml")
    old = recipes.root / "first" / WEIGHTS
    old_directory, inode = old.parent.resolve(), old.stat().st_ino
    with old.open("rb") as reader:
        begun = reader.read(1000)
        after = recipes.merged(recipes.write("first", weight=0.75))
        wait_for(lambda: recipes.weights("first") == after, "the edited recipe")
        assert begun + reader.read() == before
    assert old.stat().st_ino != inode
    assert (old_directory / WEIGHTS).read_bytes() == before, "who found the old directory earlier can go on"
    assert recipes.weights("second") != after


def test_recipes_come_and_go(recipes: Recipes) -> None:
    recipes.write("third", weight=0.125)
    wait_for(lambda: "third" in names_in(recipes.root), "the new recipe")
    assert recipes.weights("third") == recipes.merged(recipes.directory / "third.yml")
    (recipes.directory / "first.yml").unlink()
    wait_for(lambda: not (recipes.root / "first").exists(), "the recipe to go")
    assert names_in(recipes.root) == ["second", "third"]


def test_a_broken_recipe_says_why_and_disturbs_nobody(recipes: Recipes) -> None:
    recipes.mount.allowed.append("first is not shown: .*tise")
    text = (recipes.directory / "first.yml").read_text()
    (recipes.directory / "first.yml").write_text(text.replace("task_arithmetic", "tise"))
    error = recipes.root / "first" / "ERROR.txt"
    wait_for(error.exists, "the error")
    assert names_in(recipes.root / "first") == ["ERROR.txt"]
    assert "first.yml:" in error.read_text()
    assert "did you mean 'ties'" in error.read_text()
    assert recipes.weights("second") == recipes.merged(recipes.directory / "second.yml")
    entry = find_mount(recipes.root)
    assert entry is not None
    assert read_status(entry)["errors"] == {"first": error.read_text().strip()}
    (recipes.directory / "first.yml").write_text(text)
    wait_for((recipes.root / "first" / WEIGHTS).exists, "the repaired recipe")


def test_a_recipe_that_is_broken_from_the_start_is_shown_as_that(models: Family, tmp_path: Path) -> None:
    directory = tmp_path / "recipes"
    write_document(directory / "good.yml", document(models))
    (directory / "bad.yml").write_text("merge_method: [\n")
    allowed = ["bad is not shown"]
    with mounted_recipes(directory, mountpoint=tmp_path / "mnt", state=tmp_path / "state", allowed=allowed) as mount:
        assert "bad.yml:" in (mount.mountpoint / "bad" / "ERROR.txt").read_text()
        assert (mount.mountpoint / "good" / WEIGHTS).exists()


def test_a_variant_is_the_recipe_with_those_parameters(recipes: Recipes) -> None:
    variant = recipes.root / "first@weight=0.125,weight.2=1.5,lambda=0.5"
    written = document(recipes.models, weight=0.125)
    written["models"][1]["parameters"]["weight"] = 1.5  # type: ignore[index]
    written["parameters"] = {"lambda": 0.5}
    by_hand = write_document(recipes.directory.parent / "by-hand" / "recipe.yml", written)
    assert (variant / WEIGHTS).read_bytes() == recipes.merged(by_hand)
    assert names_in(recipes.root) == ["first", "second"], "variants are not listed"
    config = yaml.safe_load((variant / "mergekit_config.yml").read_text())
    assert [entry["parameters"].get("weight") for entry in config["models"]] == [None, 1.5]
    assert config["parameters"] == {"lambda": 0.5, "weight": 0.125}


def test_a_variant_follows_its_recipe(recipes: Recipes) -> None:
    variant = recipes.root / "first@lambda=0.5" / WEIGHTS
    before = variant.read_bytes()
    recipes.write("first", weight=0.75)
    wait_for(lambda: variant.read_bytes() != before, "the variant of the edited recipe")


def test_a_budget_by_path_needs_statistics_that_are_there(recipes: Recipes) -> None:
    recipes.mount.allowed.append("there is no first@budget=40%: .*mergefs analyze")
    variant = recipes.root / "first@budget=40%"
    assert not variant.exists()
    wait_for(lambda: "mergefs analyze" in recipes.mount.log(), "the reason in the log")
    entry = find_mount(recipes.root)
    assert entry is not None
    assert read_status(entry)["analysis_bytes_read"] == 0
    path = recipes.directory / "first.yml"
    analyzed = run_mergefs("--catalog", recipes.catalog, "analyze", path, state=recipes.catalog.parent / "state")
    assert analyzed.returncode == 0, analyzed.stderr
    wait_for(variant.exists, "the variant")
    with mergefs.open(path, budget="40%", catalog=recipes.catalog) as model:
        told = json.loads((variant / "mergefs.json").read_text())
        assert told["plan_id"] == model.plan.asked


@pytest.mark.parametrize(
    "name",
    [
        "first@",
        "first@weight",
        "first@weight=",
        "first@weight=many",
        "first@colour=1",
        "first@weight.9=1",
        "nothing@weight=1",
        "@weight=1",
        "first@\n2000-01-01 00:00:00,000 ERROR mergefs: made up",
        "first@weight=1@weight=2",
        "first@budget=lots",
        "first@weight=..",
    ],
)
def test_what_is_no_variant_is_no_entry_and_the_log_says_why(recipes: Recipes, name: str) -> None:
    recipes.mount.allowed.append(f"there is no {name.split('=')[0].split()[0]}")
    with pytest.raises(FileNotFoundError):
        (recipes.root / name).stat()
    if name.startswith("first@"):
        written = name.replace("\n", "\\n")
        wait_for(lambda: f"there is no {written}: " in recipes.mount.log(), "a line in the log")


@pytest.mark.parametrize("named", [False, True])
def test_recipes_of_any_name_are_shown_and_none_takes_the_place_of_something_else(
    models: Family, tmp_path: Path, named: bool
) -> None:
    hidden = ["..yml", "...yml", ".plans.yml", ".first.yml"]
    files = {"a b\n": "a b\n.yml", "a@weight=2": "a@weight=2.yml", "\u2603": "\u2603.yaml"}
    files |= {"n" * 251: "n" * 251 + ".yml"} | ({name: name for name in hidden} if named else {})
    directory = tmp_path / "recipes"
    for name in {*files.values(), *hidden}:
        write_document(directory / "unnamed", document(models)).rename(directory / name)
    given = [directory / name for name in files.values()] if named else [directory]
    with mounted_recipes(*given, mountpoint=tmp_path / "mnt", state=tmp_path / "state") as mount:
        assert names_in(mount.mountpoint) == sorted(files)
        for name in files:
            assert (mount.mountpoint / name / "config.json").read_bytes().startswith(b"{")
        assert names_in(mount.mountpoint / ".plans") == []


def test_a_recipe_whose_name_is_no_text_says_so(models: Family, tmp_path: Path) -> None:
    directory, name = tmp_path / "recipes", os.fsdecode(b"caf\xe9")
    write_document(directory / "good.yml", document(models)).with_name(f"{name}.yml").symlink_to("good.yml")
    allowed = ["is not shown: .*not UTF-8"]
    with mounted_recipes(directory, mountpoint=tmp_path / "mnt", state=tmp_path / "state", allowed=allowed) as mount:
        assert {*names_in(mount.mountpoint)} == {name, "good"}
        assert b"bytes that are not UTF-8; rename" in (mount.mountpoint / name / "ERROR.txt").read_bytes()
        assert (mount.mountpoint / "good" / WEIGHTS).exists()
        assert run_mergefs("status", mount.mountpoint, state=tmp_path / "state").returncode == 0


def test_a_recipe_that_would_read_the_mount_from_itself_is_refused(recipes: Recipes) -> None:
    recipes.mount.allowed.append("is not shown: .*inside the mount point")
    outside = recipes.directory.parent / "way-in"
    outside.symlink_to(recipes.root / "second")
    for number, path in enumerate((recipes.root / "second", outside)):
        made = document(recipes.models)
        made["models"][0]["model"] = str(path)  # type: ignore[index]
        write_document(recipes.directory / f"circle-{number}.yml", made)
        error = recipes.root / f"circle-{number}" / "ERROR.txt"
        wait_for(error.exists, "the error")
        assert "lies inside the mount point" in error.read_text()


def shelf_of(directory: Path, error: Exception) -> Shelf:
    """Return a shelf of two recipes that none can be planned of, for a reason."""
    directory.mkdir()
    for name in ("first", "second"):
        (directory / f"{name}.yml").touch()

    def plan(path: Path, variant: Variant | None) -> ModelFiles:
        raise error

    return Shelf([directory], plan, lambda shown: False)


def test_a_bug_while_a_recipe_is_planned_is_shown_in_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = shelf_of(tmp_path / "recipes", ZeroDivisionError("division by zero"))
    shelf.refresh()
    (record, _) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert shelf.errors()["first"] == (
        f"{tmp_path}/recipes/first.yml: internal error while planning (ZeroDivisionError: division by zero); this is a "
        "bug, and the log has the details"
    )


def test_a_directory_that_cannot_be_read_shows_what_it_had_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "recipes"
    shelf = shelf_of(directory, RecipeError("no recipe"))
    assert [*shelf.names()] == ["first", "second"]

    def fail(path: Path) -> tuple[Path, ...]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for turn in (1, 2):
        with monkeypatch.context() as broken:
            broken.setattr(shelf_module, "recipes_at", fail)
            for _ in range(5):
                assert [*shelf.names()] == ["first", "second"]
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"{directory} cannot be read: Input/output error"] * turn
        assert [*shelf.names()] == ["first", "second"]


@pytest.fixture(scope="module")
def root(models: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("shared")
    write_document(directory / "recipes" / "first.yml", document(models))
    with mounted_recipes(
        directory / "recipes", mountpoint=directory / "mnt", state=directory / "state", allowed=["there is no"]
    ) as mount:
        yield mount.mountpoint


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_name_reaches_outside(root: Path, data: st.DataObject) -> None:
    part = st.sampled_from(["..", ".", "first", ".plans", "@", "first@weight=..", "\n", "%2e%2e", "~", "a" * 255])
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    path = root.joinpath(*(name.lstrip("/") for name in data.draw(st.lists(part | text, max_size=5))))
    try:
        found = os.path.realpath(path, strict=True)
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
        return
    stays_inside = Path(os.path.normpath(path)).is_relative_to(root)
    assert Path(found).is_relative_to(root) or not stays_inside
