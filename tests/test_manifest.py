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
from weight_pieces import MIB, cuts, piece_at, piece_hashes

from mergefs.api import open_model
from mergefs.catalog import Catalog
from mergefs.checkpoint.dtypes import BF16
from mergefs.engine.workspace import Workspace
from mergefs.errors import UsageError, VerificationError
from mergefs.materialize import weights
from mergefs.materialize.manifest import MANIFEST_NAME, read_manifest
from mergefs.materialize.materialize import Interrupted, materialize
from mergefs.materialize.recomputing import Sample, recompute, verify_deep
from mergefs.materialize.verify import find_damage, verify
from mergefs.planner.ancestry import read_ancestry
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.progress import Silence
from mergefs.recipe.model import load_recipe
from mergefs.sources.blocks import BlockGrid
from mergefs.statistics.contents import identify
from mergefs.statistics.identity import content_digest

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
        pieces = piece_hashes(content) if name.endswith(".safetensors") else []
        expected = (pieces, b"".join(map(bytes.fromhex, pieces)) if pieces else content)
        assert (list(entry.pieces), entry.blake3) == (expected[0], blake3(expected[1]).hexdigest())
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
                step = 2 * BlockGrid.of_contents(entry.shape).step
                hashes = [blake3(raw[begin : begin + step]).digest() for begin in range(0, len(raw), step)]
                assert entry.content == content_digest(BF16, entry.shape, hashes).hex()
    assert seen == set(manifest.tensors)


def test_the_written_model_has_the_identity_that_the_manifest_tells(written: Path, tmp_path: Path) -> None:
    recipe = write_document(
        tmp_path / "recipe.yml", {"merge_method": "passthrough", "models": [{"model": str(written)}]}
    )
    assert said_by("materialize", recipe, tmp_path / "copy").status == 0
    (entry,) = read_manifest(tmp_path / "copy").contents.inputs
    assert entry.identity == read_manifest(written).content == read_manifest(tmp_path / "copy").content


def test_nothing_of_the_time_or_the_machine_is_in_what_is_hashed(written: Path) -> None:
    content = json.loads((written / MANIFEST_NAME).read_bytes())
    assert set(content) == {
        *("format", "manifest", "plan_id", "contents", "content", "mergefs_version"),
        *("cost", "files", "tensors"),
    }
    cost = {"expert_bytes_planned": 1, "expert_bytes_read": 2, "base_bytes_read": 3}
    changed = json.dumps(content | {"cost": cost}, indent=1)
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
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, workers=workers: set(range(workers)))
        monkeypatch.setattr(weights, "CHUNK", chunk * MIB)
        said = said_by(
            "--catalog", place / "catalog", "materialize", "--memory", f"{600 + chunk}MiB", recipe.name, "out"
        )
        assert said.status == 0, said.stderr
        kept.append({path.name: path.read_bytes() for path in (place / "out").iterdir()})
        if number:
            assert kept[0] == kept[number]
    assert all(entry["identity"] for entry in json.loads(kept[0][MANIFEST_NAME])["contents"]["inputs"])


def test_without_verified_reads_nothing_is_hashed_beforehand(models: Family, tmp_path: Path) -> None:
    """The manifest tells nothing of the contents of inputs then; all else is the same."""
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["task_arithmetic"], models)
    said = said_by("materialize", "--json", "--no-verify-reads", recipe, tmp_path / "out")
    shown = json.loads(said.stdout)
    assert shown["analysis_bytes_read"] == 0
    assert shown["plan_id"].startswith("local-")
    bare = read_manifest(tmp_path / "out")
    assert [entry.identity for entry in bare.contents.inputs] == ["", "", ""]
    assert said_by("materialize", recipe, tmp_path / "hashed").status == 0
    hashed = read_manifest(tmp_path / "hashed")
    assert all(entry.identity for entry in hashed.contents.inputs)
    assert (hashed.plan_id, hashed.files, hashed.tensors) == (bare.plan_id, bare.files, bare.tensors)
    assert hashed.manifest != bare.manifest


def test_inputs_that_are_hashed_only_meanwhile_are_told_like_those_that_were_before(
    models: Family, tmp_path: Path
) -> None:
    """The plan that is begun has a local id; the run ends as one of the plan that knows what its inputs hold.

    Nor does it make a difference in what is hashed that blocks are known to be equal, and not read, in one of them.
    """
    recipe = write_recipe(tmp_path / "recipe.yml", MERGES["ties"], models)
    kept, planned = [], []
    for name, identified in (("before", True), ("meanwhile", False)):
        workspace = Workspace.create(Catalog(tmp_path / f"catalog-{name}"))
        plan = make_plan(load_recipe(recipe), PlanOptions(), workspace, identified=identified)
        assert plan.plan_id.startswith("local-") is not identified
        if not identified:
            identify(plan.sources, workspace.catalog, workspace.reader, Silence())
        written = materialize(plan, tmp_path / name, workspace)
        (run,) = workspace.catalog.transactions()
        assert run.plan_id == written.plan_id == read_manifest(tmp_path / name).whole_id
        kept.append((written.plan_id, written.manifest))
        planned.append(read_manifest(tmp_path / name).cost.expert_bytes_planned)
        again = materialize(plan, tmp_path / name, workspace, interrupted=Interrupted.RESUME)
        assert (again.already_there, again.manifest) == (True, written.manifest)
        workspace.close()
    assert kept[0] == kept[1]


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
    second_manifest, first_manifest = read_manifest(tmp_path / "second"), read_manifest(tmp_path / "first")
    assert made_by["plan_id"] == second_manifest.plan_id
    assert made_by["method"] == "linear"
    assert made_by["inputs"][0]["identity"] == second_manifest.contents.inputs[0].identity == first_manifest.content
    inner = made_by["inputs"][0]["made_by"]
    assert inner["plan_id"] == first_manifest.plan_id
    assert [entry["identity"] for entry in inner["inputs"]] == [
        entry.identity for entry in first_manifest.contents.inputs
    ]
    assert [entry["reference"] for entry in inner["inputs"]] == [str(path) for path in (*models.experts, models.base)]
    assert all("made_by" not in entry for entry in inner["inputs"])


def spoil_manifest(directory: Path) -> None:
    edit(directory, lambda content: content["contents"]["inputs"][0].__setitem__("identity", "0" * 48))


def drop_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).unlink()


def edit_provenance(directory: Path) -> None:
    path = directory / "mergefs.json"
    path.write_text(path.read_text().replace('"copy_tokenizer": true', '"copy_tokenizer": false'))


@pytest.mark.parametrize("change", [spoil_manifest, drop_manifest, edit_provenance])
def test_what_the_inputs_of_an_input_held_is_believed_only_of_a_sound_manifest_that_belongs_to_it(
    out: Path, change: Callable[[Path], None]
) -> None:
    found = read_ancestry(out)
    assert found is not None
    assert all(entry.identity for entry in found.inputs)
    assert found.whole_id == read_manifest(out).whole_id
    change(out)
    found = read_ancestry(out)
    assert found is not None
    assert [entry.identity for entry in found.inputs] == ["", "", ""]
    assert all(entry.structure for entry in found.inputs)
    assert found.whole_id == found.plan_id


def test_the_first_format_of_mergefs_json_is_read_without_identities_of_the_machine_it_was_written_on(
    models: Family, tmp_path: Path
) -> None:
    shutil.copytree(models.experts[0], tmp_path / "expert")
    told = {
        "format": 1,
        "plan_id": "ab" * 16,
        "method": "linear",
        "inputs": [
            {"reference": "a", "role": "base", "identity": "cd" * 24},
            {"reference": "b", "role": "expert", "identity": f"local-{'ef' * 32}"},
        ],
        "stand_in": {"reference": "c", "identity": "01" * 24},
    }
    (tmp_path / "expert" / "mergefs.json").write_text(json.dumps(told))
    found = read_ancestry(tmp_path / "expert")
    assert found is not None
    assert found.whole_id == found.plan_id == "ab" * 16
    assert [entry.identity for entry in found.all_inputs] == ["cd" * 24, "", "01" * 24]
    recipe = write_recipe(tmp_path / "r.yml", MERGES["slerp"], Family(models.base, (tmp_path / "expert",)))
    assert said_by("materialize", recipe, tmp_path / "out").status == 0
    assert "local-" not in (tmp_path / "out" / "mergefs.json").read_text()


@pytest.mark.parametrize("content", ["{", '{"format": 4}', '{"plan_id": 1}', "[]", " " * 100])
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
        name = chance.choices(list(files), [min(size, MIB) for size in files.values()])[0]
        byte = chance.randrange(files[name])
        bit = 8 * byte + chance.randrange(8)
        flip_bit(out / name, bit)
        (damage,) = find_damage(out, manifest)
        flip_bit(out / name, bit)
        assert damage.file == out / name
        if manifest.files[name].pieces:
            content = (out / name).read_bytes()
            number, tensor = piece_at(content, byte)
            assert (damage.piece, damage.tensors) == (number, () if tensor is None else (tensor,))
            begin, end, _ = cuts(content)[number]
            assert f", piece {number} (bytes {begin} to {end}): " in damage.sentence
    assert verify(out).manifest == manifest.manifest


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def flip(directory: Path) -> None:
    flip_bit(shards(directory)[1], 8 * (MIB + 77))


def flip_in_header(directory: Path) -> None:
    flip_bit(shards(directory)[0], 8 * 20)


def flip_in_small_file(directory: Path) -> None:
    flip_bit(directory / "config.json", 8 * 5)


def cut(directory: Path) -> None:
    os.truncate(shards(directory)[0], MIB)


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
    """Change a weight file and the hashes of its pieces in the manifest."""
    path = shards(directory)[0]
    flip_bit(path, 8 * 50_000)
    forged = piece_hashes(path.read_bytes())
    edit(directory, lambda content: content["files"][path.name].__setitem__("pieces", forged))


def forget_file(directory: Path) -> None:
    edit(directory, lambda content: content["files"].pop("config.json"))


def forge_plan(directory: Path) -> None:
    edit(directory, lambda content: content.__setitem__("plan_id", "another"))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip, r"model-00002-of-.* is damaged in tensor '.+', piece \d+ \(bytes \d+ to \d+\): "),
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
    number, tensor = piece_at(shards(out)[1].read_bytes(), MIB + 77)
    assert [one["piece"] for one in listed] == [None, None, number, None]
    assert listed[2]["tensors"] == [tensor]


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


def test_a_sample_recomputes_only_so_much(own: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = own
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    sizes = sorted(end - begin for begin, end, _ in cuts((out / WEIGHTS).read_bytes()))
    for text, expected in (("2", 2), ("50%", round(len(sizes) / 2)), ("0.1%", 1), ("1000", len(sizes))):
        shown = json.loads(said_by("verify", "--deep", "--sample", text, "--json", out).stdout)
        assert sum(sizes[:expected]) <= shown["recomputed_bytes"] <= sum(sizes[-expected:]), text
        assert len(list(recompute(out, resources, sample=Sample.parse(text)))) == expected, text
    resources.close()


def test_a_sample_is_of_all_pieces(own: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = own
    resources = Workspace.create(Catalog(tmp_path / "catalog"))
    number, _ = piece_at((out / WEIGHTS).read_bytes(), 3 * MIB + 1000)
    flip_bit(out / WEIGHTS, 8 * (3 * MIB + 1000))
    found = [list(recompute(out, resources, sample=Sample(count=1), chance=random.Random(n))) for n in range(60)]
    resources.close()
    differing = [one for (one,) in found if not isinstance(one, int)]
    assert 0 < len(differing) < 60
    assert {one.piece for one in differing} == {number}


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
