"""Ordinary programs do with a mount what they do with the materialized directory."""

import filecmp
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from examples import METHODS, Families, FamilyKind
from mounting import mounted_recipes
from recipes import recipe_document, write_document

import mergefs
from mergefs.materialize.manifest import MANIFEST_NAME
from mergefs.materialize.materialize import materialize

pytestmark = pytest.mark.mounts

# Each runs where ``model`` is the directory, or a link to it. What is sorted comes in the order of a directory, which
# no file system promises; times, owners and permissions are the mount's own.
SAME_OUTPUT: Final = (
    "sha256sum model/*",
    "md5sum < model/model-00001-of-00003.safetensors",
    "cat model/*.json | cksum",
    "wc -c model/*",
    "tail -c 100 model/model-00002-of-00003.safetensors | sha256sum",
    "stat -L -c '%n %F %s' model/*",
    "stat -c '%n' model/nothing",
    "stat -f -c '%n' model/config.json",
    "find -L model -type f -printf '%P %s %y\\n' | sort",
    "find model/ -mindepth 1 -maxdepth 1 -name '*.json' -printf '%f\\n' | sort",
    "find -L model -writable -name '*.json' -newermt 2100-01-01",
    "ls model/",
    "ls -R model/ | sort",
    "ls -la model/ | awk '/^-/ {print $2, $5, $9}'",
    "ls model/nothing",
    "tar -chf - model | tar -tf - | sort",
    "tar -chf - --format=ustar --sort=name --owner=0 --group=0 --mode=644 --mtime=@0 model | sha256sum",
    "tar -czf - -C model . | tar -xzOf - ./config.json",
    "du -cb -L model/* | tail -1",
    'file() { head -c 9 "$1" | od -c; }; file model/model-00001-of-00003.safetensors',
    "dd if=model/model-00001-of-00003.safetensors bs=4096 iflag=direct status=none | sha256sum",
    "dd if=model/model-00001-of-00003.safetensors bs=7 skip=3 count=5 status=none | od -c",
    "grep -c model_type model/config.json",
    "grep -rl nothing_like_this model/",
    "cmp model/config.json model/generation_config.json",
    "python3 -m json.tool model/config.json",
    "gzip -c model/model-00003-of-00003.safetensors | gzip -dc | sha256sum",
    "test -r model/config.json && test ! -x model/config.json && test -d model && echo yes",
    "cd model && pwd > /dev/null && echo *",
)
COPIES: Final = (
    "cp -r model/ OUT",
    "cp -rL model OUT",
    "mkdir OUT && cp -a model/. OUT",
    "mkdir OUT && cp --reflink=auto --sparse=always model/* OUT",
    "rsync -a model/ OUT",
    "rsync -rL --checksum --inplace model/ OUT",
    "mkdir OUT && tar -C model -cf - . | tar -C OUT -xf -",
    "mkdir OUT && (cd model && find . -type f -print0 | xargs -0 -I{} install -m 644 {} OUT/{})",
    'mkdir OUT && for f in model/*; do cat "$f" > OUT/"${f##*/}"; done',
)


@dataclass(frozen=True, slots=True)
class Directories:
    """Directories in which ``model`` is the merge: materialized, mounted alone, and a link into a mount of recipes."""

    materialized: Path
    mounted: tuple[Path, ...]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, catalogs: Path, families: Families) -> Iterator[Directories]:
    root = tmp_path_factory.mktemp("tools")
    catalog = catalogs / root.name
    recipe = root / "recipes" / "merge.yml"
    write_document(recipe, recipe_document(METHODS["ties"], families(FamilyKind())))
    with mergefs.open(recipe, catalog=catalog, max_shard_size="20KB") as model:
        materialize(model.plan, root / "written" / "model", model._resources)
    (root / "written" / "model" / MANIFEST_NAME).unlink()  # which only what has been written has
    options, extra = ["--max-shard-size", "20KB"], {"MERGEFS_CATALOG": str(catalog)}
    (root / "linked").mkdir()
    (root / "linked" / "model").symlink_to(root / "live" / "merge")
    with (
        mounted_recipes(
            recipe, mountpoint=root / "mounted" / "model", state=root / "state", options=options, extra=extra
        ),
        mounted_recipes(recipe.parent, mountpoint=root / "live", state=root / "state", options=options, extra=extra),
    ):
        yield Directories(root / "written", (root / "mounted", root / "linked"))


def run(command: str, directory: Path) -> tuple[int, str, str]:
    """Return the exit status and what the command printed."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=directory,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", SAME_OUTPUT)
def test_a_program_gives_the_same_output_and_exit_status(directories: Directories, command: str) -> None:
    expected = run(command, directories.materialized)
    for directory in directories.mounted:
        assert run(command, directory) == expected


@pytest.mark.parametrize("command", COPIES)
def test_a_copy_is_the_materialized_directory(directories: Directories, tmp_path: Path, command: str) -> None:
    for number, directory in enumerate(directories.mounted):
        out = tmp_path / str(number)
        assert run(command.replace("OUT", str(out)), directory) == (0, "", "")
        assert_same_files(out, directories.materialized / "model")


def assert_same_files(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    assert filecmp.cmpfiles(found, expected, names, shallow=False) == (names, [], [])


def test_comparing_programs_find_no_difference(directories: Directories) -> None:
    materialized = directories.materialized / "model"
    for directory in directories.mounted:
        for command in (f"diff -r model/ {materialized}", f"rsync -rnc --itemize-changes model/ {materialized}/"):
            assert run(command, directory) == (0, "", "")


def test_nothing_can_be_copied_into_it(directories: Directories) -> None:
    for directory in directories.mounted:
        for command in (
            "cp /etc/passwd model/",
            "rsync /etc/passwd model/",
            "touch model/config.json",
            "rm -f model/*",
        ):
            status, printed, error = run(command, directory)
            assert status != 0
            assert printed == ""
            assert "Read-only file system" in error
    assert_same_files(directories.mounted[0] / "model", directories.materialized / "model")


def test_df_shows_a_full_file_system_of_the_models_size(directories: Directories) -> None:
    size = sum(path.stat().st_size for path in (directories.materialized / "model").iterdir())
    for directory in directories.mounted:
        status, printed, error = run("df -B1 --output=source,fstype,size,used,avail,pcent model", directory)
        assert (status, error) == (0, "")
        source, kind, total, used, available, share = printed.splitlines()[1].split()
        assert (source, kind, available, share) == ("mergefs", "fuse.mergefs", "0", "100%")
        assert size <= int(total) == int(used) < size + 2 * 4096


def test_getfattr_shows_the_plan_where_a_disk_has_nothing_to_show(directories: Directories) -> None:
    assert run("getfattr -d -m - model/config.json", directories.materialized) == (0, "", "")
    for directory in directories.mounted:
        plan = os.getxattr(directory / "model" / "config.json", "user.mergefs.plan_id").decode()
        shown = run("getfattr -d -m - model/config.json", directory)
        assert shown == (0, f'# file: model/config.json\nuser.mergefs.plan_id="{plan}"\n\n', "")
    missing = "getfattr -n user.other model/config.json"
    assert run(missing, directories.mounted[0]) == run(missing, directories.materialized)
