"""The benchmark: that its families are what it says, that it measures by turns and goes on, and that it compares."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from mounting import ROOT, environment

sys.path.append(str(ROOT / "scripts"))

from bench.cold import evict, throttled
from bench.comparing import Weights, same_bits, same_merge
from bench.families import SHARES, Family, make_family
from bench.markdown import at_least, at_most
from bench.page import BEGIN, END, with_measured
from bench.processes import Taken, measured
from bench.processes import environment as programs_environment
from bench.recipes import DENSITY
from bench.results import Checked, Results
from bench.rounds import Patience, Row, Way, run_row
from bench.rows.catalogue import all_rows, chosen
from bench.sections import peers
from bench.setting import SMOKE, Extent, Setting, named
from bench.shapes import LLAMA_405B, shape_of_size

from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.errors import MergefsError

SIZE = 2**20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("families"), SIZE, 2)


# Families -------------------------------------------------------------------------------------------------------------


def test_shares_of_elements_are_so_many_ulps_from_the_base_and_some_tensors_are_frozen(made: Family) -> None:
    base, first, second = (Weights(path) for path in (made.base, *made.experts))
    steps: list[np.ndarray] = []
    for name in base.names():
        moved = first[name].astype(np.int64) - base[name].astype(np.int64)
        if name.endswith("norm.weight"):
            assert not moved.any()
        else:
            steps.append(np.abs(moved))
    every = np.concatenate(steps)
    for ulps, share in SHARES.items():
        assert np.mean(every == ulps) == pytest.approx(share, abs=0.005)
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(second[embedding], base[embedding]) and not np.array_equal(first[embedding], base[embedding])


def test_a_family_is_the_same_wherever_it_is_made_and_is_made_once(made: Family, tmp_path: Path) -> None:
    again = make_family(tmp_path, SIZE, 1)
    assert same_bits(again.experts[0], made.experts[0]).same
    written = {path: path.stat().st_mtime_ns for path in again.weights()}
    more = make_family(tmp_path, SIZE, 2)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert same_bits(more.experts[1], made.experts[1]).same


@pytest.mark.parametrize("size", [SIZE, 20 * SIZE, 150 * 10**6, 2**30])
def test_a_shape_has_the_size_that_was_asked_for_or_little_more(size: int) -> None:
    assert size <= 2 * shape_of_size(size).parameters < 1.3 * size


def test_models_open_as_checkpoints_in_several_shards(made: Family) -> None:
    checkpoint = open_checkpoint(made.base)
    assert len(checkpoint.shards) > 1
    assert 2 * made.parameters == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_the_large_shape_has_405_billion_parameters() -> None:
    assert LLAMA_405B.parameters == pytest.approx(405e9, rel=0.01)


# Rounds ---------------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Ways that note when they ran; ``seconds`` is what each says that it took."""

    results: Results
    seconds: float = 1.0
    order: list[str] = field(default_factory=list)

    def way(self, name: str) -> Way:
        def run() -> Taken:
            self.order.append(name)
            return Taken(self.seconds)

        return Way(name, run)

    def row(self, check: Callable[[], Checked] | None = None) -> Row:
        return Row("row", lambda: (self.way("a"), self.way("b")), check)


def quiet(line: str) -> None:
    """Say nothing."""


def test_ways_take_turns_and_each_begins_every_other_round(tmp_path: Path) -> None:
    runs = Runs(Results(tmp_path / "measurements.jsonl", "this"))
    assert run_row(runs.row(), runs.results, Patience(3, 100.0), quiet)
    assert runs.order == ["a", "b", "b", "a", "a", "b"]


def test_a_way_is_not_run_again_once_patience_has_ended(tmp_path: Path) -> None:
    runs = Runs(Results(tmp_path / "measurements.jsonl", "this"), seconds=60.0)
    run_row(runs.row(), runs.results, Patience(5, 100.0), quiet)
    assert [len(runs.results.taken("row", way)) for way in "ab"] == [2, 2]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    runs = Runs(Results(path, "this"))
    run_row(runs.row(), runs.results, Patience(2, 100.0), quiet)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    resumed = Runs(Results(path, "this"))
    assert run_row(resumed.row(), resumed.results, Patience(2, 100.0), quiet)
    assert resumed.order == ["a"]
    done = Runs(Results(path, "this"))
    assert run_row(done.row(), done.results, Patience(2, 100.0), quiet)
    assert done.order == []


def test_what_was_measured_of_something_else_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    Results(path, "this").keep("row", "a", Taken(1.0))
    assert Results(path, "another").taken("row", "a") == []
    assert Results(path, "this").taken("row", "a") == [Taken(1.0)]


def test_nothing_more_is_measured_of_a_row_whose_outputs_differ(tmp_path: Path) -> None:
    runs = Runs(Results(tmp_path / "measurements.jsonl", "this"))
    row = runs.row(lambda: Checked(False, "they differ"))
    assert not run_row(row, runs.results, Patience(3, 100.0), quiet)
    assert runs.order == ["a", "b"]
    assert not run_row(row, runs.results, Patience(3, 100.0), quiet)
    assert runs.order == ["a", "b"]


# Processes ------------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_command_is_its_own_and_not_that_of_whoever_measures() -> None:
    held = bytearray(b"x" * (256 * 2**20))
    taken = measured([sys.executable, "-I", "-S", "-c", "print('here')"], dict(os.environ))
    assert taken.output == "here\n"
    assert 2**20 < taken.peak_bytes < 64 * 2**20 < len(held)
    large = measured([sys.executable, "-I", "-S", "-c", "x = b'x' * (128 * 2**20)"], dict(os.environ))
    assert large.peak_bytes > 128 * 2**20


def test_programs_are_measured_with_the_byte_code_that_they_have_when_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "program.py").write_text("answer = 42")
    variables = programs_environment(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    measured([sys.executable, "-c", "import program"], variables)
    assert list(tmp_path.glob("__pycache__/program.*.pyc"))


def test_files_are_taken_out_of_the_page_cache_unharmed(made: Family) -> None:
    files = made.weights()
    before = [path.read_bytes() for path in files]
    os.sync()
    evict(files)
    assert [path.read_bytes() for path in files] == before


def test_a_throttle_leaves_no_group_of_the_kernel_behind(tmp_path: Path) -> None:
    with throttled(tmp_path) as limits:
        groups = () if limits is None else limits.groups
        assert all(path.exists() for path in groups)
    assert not any(path.exists() for path in groups)


# Comparisons ----------------------------------------------------------------------------------------------------------


def changed_copy(model: Path, place: Path, elements: dict[str, list[int]]) -> Path:
    """Copy a model with the lowest bit of some elements flipped."""
    place.mkdir()
    for path in model.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    for shard in open_checkpoint(place).shards:
        with shard.path.open("r+b") as file:
            for tensor in shard.header.tensors:
                for element in elements.get(tensor.name, []):
                    file.seek(tensor.begin + 2 * element)
                    low = file.read(1)[0]
                    file.seek(tensor.begin + 2 * element)
                    file.write(bytes([low ^ 1]))
    return place


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_single_bit_is_a_difference(made: Family, tmp_path: Path, method: str) -> None:
    assert same_merge(method, made, made.base, made.base).same
    other = changed_copy(made.base, tmp_path / "other", {"model.layers.1.mlp.up_proj.weight": [77]})
    found = same_merge(method, made, other, made.base)
    assert not found.same
    assert "1 of" in found.found


def test_ties_may_differ_only_where_a_delta_has_the_magnitude_that_the_density_ends_at(
    made: Family, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base, expert = (Weights(path)[name] for path in (made.base, made.experts[0]))
    delta = np.abs(numbers(expert) - numbers(base))
    least = np.sort(delta)[::-1][int(DENSITY * len(delta)) - 1]
    at_the_end = int(np.flatnonzero(delta == least)[0])
    far_from_it = int(np.argmax(delta))
    assert same_merge("ties", made, changed_copy(made.base, tmp_path / "open", {name: [at_the_end]}), made.base).same
    other = changed_copy(made.base, tmp_path / "other", {name: [far_from_it]})
    second = np.abs(numbers(Weights(made.experts[1])[name]) - numbers(base))
    assert second[far_from_it] != np.sort(second)[::-1][int(DENSITY * len(second)) - 1]
    assert not same_merge("ties", made, other, made.base).same


def numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_slerp_may_be_off_by_single_units_and_no_more(made: Family, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert same_merge("slerp", made, changed_copy(made.base, tmp_path / "one", {name: [5]}), made.base).same
    far = changed_copy(made.base, tmp_path / "far", {})
    weights = next(shard for shard in open_checkpoint(far).shards if name in {t.name for t in shard.header.tensors})
    begin = next(tensor.begin for tensor in weights.header.tensors if tensor.name == name)
    with weights.path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\x80\x3f")  # one, where weights are small
    assert not same_merge("slerp", made, far, made.base).same


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_random_masks_are_compared_by_what_they_change(made: Family, tmp_path: Path, method: str) -> None:
    first, second = made.experts
    assert same_merge(method, made, first, first).same
    assert not same_merge(method, made, first, second).same, "whose embedding is frozen"


# The page -------------------------------------------------------------------------------------------------------------


def test_a_row_whose_outputs_differ_is_not_compared(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 2**30, 150 * 10**6, 2, Extent())
    results = Results(tmp_path / "measurements.jsonl", "this")
    name = peers.name_of("ties", 4, setting.large)
    for way in (peers.MERGEKIT, peers.COLD, peers.WARM, peers.COPYING):
        results.keep(name, way, Taken(123.0))
        results.keep("start-ties", way, Taken(1.0))
    results.keep_check(name, Checked(False, "elements differ"))
    text = peers.section(setting, results)
    assert "no comparison" in text and "elements differ" in text
    assert "123" not in text
    assert all(target.met is None for target in peers.targets(setting, results))


def test_targets_are_met_or_missed() -> None:
    assert at_least("fast", 5.0, 5).met and not at_least("fast", 4.9, 5).met and at_least("fast", None, 5).met is None
    assert at_most("short", 1.5, 1.5).met and not at_most("short", 1.6, 1.5).met


def test_the_measured_part_of_a_page_is_replaced_and_the_rest_is_kept() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_measured(page, "new") == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    with pytest.raises(MergefsError, match="has no lines"):
        with_measured("nothing here", "new")


def test_what_matters_most_is_measured_first(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 2**30, 150 * 10**6, 2, Extent())
    names = [row.name for row in all_rows(setting)]
    assert len(names) == len(set(names))
    assert names[:5] == ["disk@1GiB", "start-ties", "ties-k4@1GiB", "start-linear", "linear-k4@1GiB"]
    assert {f"{method}-k{count}@1GiB" for method in ("ties", "della", "model_stock") for count in (2, 4, 8)} <= {*names}
    assert [row.name for row in chosen(all_rows(setting), "slerp*, budgets-ties*")] == [
        "budgets-ties-k8@1GiB",
        "slerp-k2@150MB",
        "slerp-k2@1GiB",
    ]


@pytest.mark.parametrize(("size", "name"), [(2**30, "1GiB"), (150 * 10**6, "150MB"), (4 * 2**20, "4MiB"), (7, "7B")])
def test_sizes_are_named_as_they_are_asked_for(size: int, name: str) -> None:
    assert named(size) == name


def test_the_committed_page_has_its_place_for_what_is_measured() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert with_measured(page, "x").count("x") >= 1
    for figure in re.findall(r"\]\((figures/[^)]+)\)", page):
        assert (ROOT / "docs" / figure).read_bytes().startswith(b"\x89PNG")


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_the_whole_benchmark_runs_on_small_models_and_goes_on_where_it_was(tmp_path: Path) -> None:
    page, work = tmp_path / "benchmarks.md", tmp_path / "work"
    command = [sys.executable, ROOT / "scripts" / "bench.py", "compare", "--smoke", "--repeat", "1"]
    command += ["--size", "2MiB", "--small-size", "2MiB", "--work", work, "--document", page]
    runs = []
    for _ in range(2):
        result = subprocess.run(
            command, env=environment(tmp_path, {}), capture_output=True, text=True, timeout=1000, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        runs.append((page.read_text(encoding="utf-8"), result.stderr))
    (text, said), (same, nothing) = runs
    setting = Setting(work, 2 * SIZE, 2 * SIZE, 2, SMOKE)
    for row in all_rows(setting):
        assert f"{row.name}: " in said
    assert (same, nothing) == (text, "")
    lines = [json.loads(line) for line in (work / "measurements.jsonl").read_text().splitlines()]
    assert all(line["checked"]["same"] for line in lines if "checked" in line)
    assert "no comparison" not in text and "Reading a mount" in text and "Several variants" in text
    for figure in ("peers", "budgets", "mounts"):
        assert (tmp_path / "figures" / f"bench-{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert not any(work.joinpath("scratch").glob("*/mnt/*")), "a mount was left"
