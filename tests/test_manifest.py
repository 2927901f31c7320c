"""The manifest: the same on every machine, and every damage of a written model is found by it, named, and repaired."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from checkpoints import Family, family
from damage import flip_bit
from recipes import MERGES, write_document, write_recipe
from safetensors import safe_open
from sentences import said_by

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.cli import materialize as materialize_command
from mergefs.engine.workspace import Workspace
from mergefs.errors import UsageError, VerificationError
from mergefs.materialize import weights
from mergefs.materialize.manifest import MANIFEST_NAME, PIECE, read_manifest
from mergefs.materialize.recomputing import Sample, recompute, verify_deep
from mergefs.materialize.verify import find_damage, verify

WEIGHTS = "model.safetensors"
FLIPS = 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(
        tmp_path_factory.mktemp("models"),
        experts=2,
        dtype=torch.bfloat16,
        tied=False,
        shards=1,
        hidden=256,
        layers=1,
        vocabulary=5000,
    )


@pytest.fixture(scope="module")
def written(models: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A materialized model of several files of weights, none of a whole number of pieces."""
    directory = tmp_path_factory.mktemp("written")
    recipe = write_recipe(directory / "recipe.yml", MERGES["ties"], models)
    said = said_by(
        "--catalog", directory / "catalog", "materialize", "--max-shard-size", "3MiB", recipe, directory / "out"
    )
    assert said.status == 0, said.stderr
    assert len(list((directory / "out").glob("*.safetensors"))) > 1
    return directory / "out"


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


# What it says ---------------------------------------------------------------------------------------------------------


def test_it_has_the_hash_of_every_piece_and_every_tensor(written: Path) -> None:
    manifest = read_manifest(written)
    assert sorted(manifest.files) == sorted(p.name for p in written.iterdir() if p.name != MANIFEST_NAME)
    for name, entry in manifest.files.items():
        content = (written / name).read_bytes()
        pieces = [blake3(content[begin : begin + PIECE]).hexdigest() for begin in range(0, len(content), PIECE)]
        assert list(entry.pieces) == (pieces if name.endswith(".safetensors") else [])
    seen = set()
    for path in written.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                seen.add(name)
                entry = manifest.tensors[name]
                tensor = file.get_tensor(name)
                raw = path.read_bytes()[entry.offset : entry.offset + entry.size]
                assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
                assert (entry.file, entry.shape, entry.dtype) == (path.name, tuple(tensor.shape), "BF16")
                assert entry.blake3 == blake3(raw).hexdigest()
    assert seen == set(manifest.tensors)


def test_the_written_model_has_the_identity_that_the_manifest_tells(written: Path, tmp_path: Path) -> None:
    recipe = write_document(
        tmp_path / "recipe.yml", {"merge_method": "passthrough", "models": [{"model": str(written)}]}
    )
    assert said_by("materialize", recipe, tmp_path / "copy").status == 0
    (entry,) = json.loads((tmp_path / "copy" / "mergefs.json").read_bytes())["inputs"]
    assert entry["identity"] == read_manifest(written).content == read_manifest(tmp_path / "copy").content


def test_nothing_of_the_time_or_the_machine_is_in_what_is_hashed(written: Path) -> None:
    content = json.loads((written / MANIFEST_NAME).read_bytes())
    assert set(content) == {
        *("format", "manifest", "plan_id", "content", "mergefs_version", "piece_bytes"),
        *("expert_bytes_planned", "read", "files", "tensors"),
    }
    changed = json.dumps(content | {"read": {"expert_bytes": 1, "base_bytes": 2}}, indent=1)
    (written.parent / "again").mkdir()
    (written.parent / "again" / MANIFEST_NAME).write_text(changed)
    assert read_manifest(written.parent / "again").manifest == content["manifest"]


# The same everywhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGES)
def test_chunks_threads_caches_shards_places_and_catalogs_make_no_difference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = MERGES[name]
    kept: list[dict[str, bytes]] = []
    for number, (shards, workers, chunk) in enumerate([(1, 1, 8), (3, 7, 1), (2, 3, 2)]):
        place = tmp_path / str(number)
        models = family(place, experts=2, dtype=torch.bfloat16, tied=False, shards=shards)
        relative = Family(Path(models.base.name), tuple(Path(expert.name) for expert in models.experts))
        recipe = write_recipe(place / "recipe.yml", merge, relative)
        monkeypatch.chdir(place)
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        monkeypatch.setattr(materialize_command, "_CACHE_SIZE", chunk * 1000)
        monkeypatch.setattr(weights, "CHUNK", chunk * PIECE)
        said = said_by("--catalog", place / "catalog", "materialize", recipe.name, "out")
        assert said.status == 0, said.stderr
        kept.append({path.name: path.read_bytes() for path in (place / "out").iterdir()})
        if number:
            assert kept[0] == kept[number]
    assert not json.loads(kept[0]["mergefs.json"])["plan_id"].startswith("local-")


def test_without_verified_reads_nothing_is_hashed_beforehand(models: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    said = said_by("materialize", "--json", "--no-verify-reads", recipe, tmp_path / "out")
    assert json.loads(said.stdout)["analysis_bytes_read"] == 0
    assert read_manifest(tmp_path / "out").plan_id.startswith("local-")


# Ancestry -------------------------------------------------------------------------------------------------------------


def test_what_an_input_was_made_of_is_told_in_mount_and_output_alike(models: Family, tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "first.yml", MERGES["task_arithmetic"], models)
    assert said_by("materialize", first, tmp_path / "first").status == 0
    second = write_recipe(
        tmp_path / "second.yml", MERGES["linear without a base"], Family(models.base, (tmp_path / "first", models.base))
    )
    assert said_by("materialize", second, tmp_path / "second").status == 0
    third = write_recipe(tmp_path / "third.yml", MERGES["slerp"], Family(models.base, (tmp_path / "second",)))
    assert said_by("materialize", third, tmp_path / "third").status == 0
    told = (tmp_path / "third" / "mergefs.json").read_bytes()
    with open_model(third) as model:
        assert model.read_file("mergefs.json") == told
    made_by = json.loads(told)["inputs"][0]["made_by"]
    assert made_by["plan_id"] == read_manifest(tmp_path / "second").plan_id
    assert made_by["method"] == "linear"
    inner = made_by["inputs"][0]["made_by"]
    assert inner["plan_id"] == read_manifest(tmp_path / "first").plan_id
    assert [entry["reference"] for entry in inner["inputs"]] == [str(path) for path in (*models.experts, models.base)]
    assert all("made_by" not in entry for entry in inner["inputs"])


@pytest.mark.parametrize("content", ["{", '{"plan_id": 1}', "[]", " " * 100])
def test_an_unreadable_provenance_of_an_input_is_told_and_harms_nothing(
    models: Family, tmp_path: Path, content: str
) -> None:
    shutil.copytree(models.experts[0], tmp_path / "expert")
    (tmp_path / "expert" / "mergefs.json").write_text(content)
    recipe = write_recipe(tmp_path / "r.yml", MERGES["slerp"], Family(models.base, (tmp_path / "expert",)))
    said = said_by("materialize", recipe, tmp_path / "out")
    assert said.status == 0
    assert f"what {tmp_path / 'expert'} was made of is unknown, since its mergefs.json cannot be read" in said.stdout


# Damage ---------------------------------------------------------------------------------------------------------------


def test_every_single_flipped_bit_is_found_and_its_piece_and_tensor_are_named(out: Path) -> None:
    manifest = read_manifest(out)
    files = {name: entry.size for name, entry in manifest.files.items()}
    chance = random.Random(7)
    for _ in range(FLIPS):
        name = chance.choices(list(files), [min(size, PIECE) for size in files.values()])[0]
        byte = chance.randrange(files[name])
        bit = 8 * byte + chance.randrange(8)
        flip_bit(out / name, bit)
        (damage,) = find_damage(out, manifest)
        flip_bit(out / name, bit)
        assert damage.file == out / name
        if manifest.files[name].pieces:
            holders = [
                tensor
                for tensor, entry in manifest.tensors.items()
                if entry.file == name and entry.offset <= byte < entry.offset + entry.size
            ]
            assert (damage.piece, list(damage.tensors)) == (byte // PIECE, holders)
    assert verify(out).manifest == manifest.manifest


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def flip(directory: Path) -> None:
    flip_bit(shards(directory)[1], 8 * (PIECE + 77))


def flip_in_header(directory: Path) -> None:
    flip_bit(shards(directory)[0], 8 * 20)


def flip_in_small_file(directory: Path) -> None:
    flip_bit(directory / "config.json", 8 * 5)


def cut(directory: Path) -> None:
    os.truncate(shards(directory)[0], PIECE)


def lengthen(directory: Path) -> None:
    with (directory / "tokenizer.json").open("ab") as file:
        file.write(b" ")


def remove(directory: Path) -> None:
    (directory / "generation_config.json").unlink()


def replace_by_directory(directory: Path) -> None:
    (directory / "README.md").unlink()
    (directory / "README.md").mkdir()


def add_weights(directory: Path) -> None:
    shutil.copy(shards(directory)[0], directory / "more.safetensors")


def add_pickle(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((directory / MANIFEST_NAME).read_bytes())
    change(content)
    (directory / MANIFEST_NAME).write_text(json.dumps(content))


def forge_piece(directory: Path) -> None:
    """Change a weight file and the hash of its piece in the manifest."""
    path = shards(directory)[0]
    flip_bit(path, 8 * 50_000)
    forged = blake3(path.read_bytes()[:PIECE]).hexdigest()
    edit(directory, lambda content: content["files"][path.name]["pieces"].__setitem__(0, forged))


def forget_file(directory: Path) -> None:
    edit(directory, lambda content: content["files"].pop("config.json"))


def forge_plan(directory: Path) -> None:
    edit(directory, lambda content: content.__setitem__("plan_id", "another"))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip, r"model-00002-of-.* is damaged in tensor '.+', piece 1 \(bytes 1048576 to \d+\): "),
    "a flipped bit of a header": (flip_in_header, r"model-00001-of-.* is damaged in its header, piece 0 "),
    "a flipped bit of a small file": (flip_in_small_file, r"config.json: is damaged: its blake3 hash"),
    "a shorter file": (cut, r"model-00001-of-.* has 1048576 bytes and was written with"),
    "a longer file": (lengthen, r"tokenizer.json: has \d+ bytes and was written with"),
    "a file that is gone": (remove, r"generation_config.json: cannot be read \(No such file"),
    "a directory in place of a file": (replace_by_directory, r"README.md: (cannot be read|has \d+ bytes)"),
    "weights too many": (add_weights, r"more.safetensors: is not in mergefs.manifest.json; remove it"),
    "a pickle": (add_pickle, r"pytorch_model.bin: is not in mergefs.manifest.json; remove it"),
    "a forged piece": (forge_piece, r"mergefs.manifest.json: is damaged: its hash is"),
    "a forgotten file": (forget_file, r"mergefs.manifest.json: is damaged: its hash is"),
    "another plan": (forge_plan, r"mergefs.manifest.json: is damaged: its hash is"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_kind_of_damage_is_found_repaired_and_gone(written: Path, out: Path, name: str) -> None:
    spoil, sentence = DAMAGES[name]
    spoil(out)
    with pytest.raises(VerificationError, match=sentence):
        verify(out)
    assert said_by("verify", out).status == 1
    shutil.rmtree(out)
    shutil.copytree(written, out)
    assert verify(out).manifest == read_manifest(written).manifest


def test_all_damage_is_listed_on_request(out: Path) -> None:
    for spoil in (flip, flip_in_small_file, remove, add_pickle):
        spoil(out)
    said = said_by("verify", "--all", out)
    assert said.status == 1
    assert said.stdout.count("\n") == 4
    assert f"{out}: 4 places are damaged" in said.stderr
    listed = json.loads(said_by("verify", "--all", "--json", out).stdout)["damage"]
    assert [Path(one["file"]).name for one in listed[:3]] == [
        "config.json",
        "generation_config.json",
        shards(out)[1].name,
    ]
    assert [one["piece"] for one in listed] == [None, None, 1, None]
    assert len(listed[2]["tensors"]) == 1


def test_a_sound_model_says_so(out: Path) -> None:
    manifest = read_manifest(out)
    for options in ([], ["--all"]):
        assert f"as they were written: manifest {manifest.manifest}" in said_by("verify", *options, out).stdout
        shown = json.loads(said_by("verify", "--json", *options, out).stdout)
        assert (shown["manifest"], shown["damage"]) == (manifest.manifest, [])


# Against the sources --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(models: Family, tmp_path: Path) -> tuple[Path, Path]:
    """A model and its expert, to be damaged."""
    shutil.copytree(models.experts[0], tmp_path / "expert")
    recipe = write_recipe(
        tmp_path / "recipe.yml", MERGES["slerp"], Family(models.base, (tmp_path / "expert", *models.experts[1:]))
    )
    assert said_by("materialize", recipe, tmp_path / "own").status == 0
    return tmp_path / "own", tmp_path / "expert"


def test_sources_that_give_something_else_are_found_and_restored(own: tuple[Path, Path]) -> None:
    out, expert = own
    assert said_by("verify", "--deep", out).status == 0
    path = expert / WEIGHTS
    bit = 8 * (path.stat().st_size - 2) + 5  # of the mantissa of the last element
    flip_bit(path, bit)
    said = said_by("verify", "--deep", out)
    assert said.status == 1
    assert "differs from what the sources give now, in tensor" in said.stderr
    listed = json.loads(said_by("verify", "--deep", "--all", "--json", out).stdout)["damage"]
    assert len(listed) == 1
    assert listed[0]["tensors"] == [max(read_manifest(out).tensors.items(), key=lambda item: item[1].offset)[0]]
    flip_bit(path, bit)
    said = said_by("verify", "--deep", "--all", out)
    assert said.status == 0, said.stderr
    assert "of weights are what the sources give now" in said.stdout


def test_a_sample_recomputes_only_so_much(own: tuple[Path, Path]) -> None:
    out, _ = own
    size = (out / WEIGHTS).stat().st_size
    pieces = -(-size // PIECE)
    for text, expected in (("2", 2), ("50%", round(pieces / 2)), ("0.1%", 1), ("1000", pieces)):
        shown = json.loads(said_by("verify", "--deep", "--sample", text, "--json", out).stdout)
        assert 0 <= expected * PIECE - shown["recomputed_bytes"] < PIECE, text


def test_a_sample_is_of_all_pieces(own: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = own
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    flip_bit(out / WEIGHTS, 8 * (3 * PIECE + 1000))
    found = [list(recompute(out, resources, sample=Sample(count=1), chance=random.Random(n))) for n in range(30)]
    resources.close()
    differing = [one for (one,) in found if not isinstance(one, int)]
    assert 0 < len(differing) < 30
    assert {one.piece for one in differing} == {3}


@pytest.mark.parametrize("text", ["", "0", "-1", "0%", "101%", "a few", "1.5", "nan%"])
def test_a_sample_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is neither a number of pieces"):
        Sample.parse(text)


def test_a_sample_needs_deep(out: Path) -> None:
    said = said_by("verify", "--sample", "5%", out)
    assert said.status == 2
    assert "--sample says how much --deep computes again" in said.stderr


def test_a_damaged_file_is_told_before_anything_is_recomputed(own: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = own
    flip_bit(out / WEIGHTS, 8 * 100_000)
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    with pytest.raises(VerificationError, match="is damaged in tensor"):
        verify_deep(out, resources)
    assert resources.ledger.totals().expert_bytes_read == 0
    resources.close()
