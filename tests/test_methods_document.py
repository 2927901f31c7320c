"""The example in docs/methods.md works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import family
from mounting import environment, run_mergefs
from packages import install, use
from tensors import load_model

import mergefs
from mergefs.methods.registry import get_method
from mergefs.testing import CHECKS

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The example, installed."""
    (project,) = blocks("toml")

    def value(key: str) -> str:
        found = re.search(f'^{key} = "(.*)"$', project, flags=re.MULTILINE)
        assert found
        return found[1]

    return install(
        tmp_path / "site",
        blocks("python")[0],
        distribution=value("name"),
        version=value("version"),
        entry_points={"keep_length": value("keep_length")},
    )


def test_the_example_passes_its_own_tests(package: Path) -> None:
    variables = environment(package) | {"PYTHONPATH": f"{package}:{environment(package)['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[1]], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_the_example_merges_by_the_formula(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, package)
    made = family(tmp_path, experts=2, dtype=torch.float32, tied=False, shards=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(blocks("yaml")[0].replace("bfloat16", "float32"))
    with mergefs.open(recipe) as model:
        merged = {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118 (it is no mapping)
    base, *experts = (load_model(path) for path in (made.base, *made.experts))
    for name, strength in (("model.layers.0.mlp.up_proj.weight", 0.5), ("model.layers.1.mlp.up_proj.weight", 1.0)):
        deltas = [expert[name].double() - base[name].double() for expert in experts]
        mean = (deltas[0] + deltas[1]) / 2
        length = (deltas[0].norm() + deltas[1].norm()) / 2
        expected = base[name].double() + strength * length / mean.norm() * mean
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_the_commands_know_the_example(package: Path, tmp_path: Path) -> None:
    family(tmp_path, experts=2, dtype=torch.bfloat16, tied=False, shards=1)
    (tmp_path / "recipe.yml").write_text(blocks("yaml")[0])
    extra = {"PYTHONPATH": f"{package}:{environment(tmp_path)['PYTHONPATH']}"}

    def run(*arguments: str) -> str:
        done = run_mergefs(*arguments, state=tmp_path / "state", cwd=tmp_path, extra=extra)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert any("keep_length" in line and "example-merge 1.0" in line for line in run("methods").splitlines())
    assert "example-merge 1.0" in run("methods", "keep_length")
    run("plan", "recipe.yml", "--budget", "50%")
    run("materialize", "recipe.yml", "out")
    run("verify", "--deep", "out")


def test_the_example_recipe_is_one_and_the_table_has_every_check() -> None:
    assert yaml.safe_load(blocks("yaml")[0])["merge_method"] == "keep_length"
    text = DOCUMENT.read_text()
    assert [name for name in CHECKS if f"| `{name}` |" not in text] == []


def test_two_versions_of_a_package_do_not_share_what_they_know_of_tensors(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second counts elements under the name that the first sums squares under."""
    made = family(tmp_path, experts=2, dtype=torch.float32, tied=False, shards=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(blocks("yaml")[0].replace("bfloat16", "float32"))
    changed = blocks("python")[0].replace("(expert - base).astype(np.float64) ** 2", "np.ones(expert.size)")
    other = install(tmp_path / "two", changed, version="2.0", entry_points={"keep_length": "example_merge:METHOD"})
    merged = []
    for site in (package, other):
        with monkeypatch.context() as patch:
            use(patch, site)
            assert get_method("keep_length").specification.name == "keep_length"
            with mergefs.open(recipe, catalog=tmp_path / "catalog") as model:
                merged.append(model.get_tensor("lm_head.weight"))
    base = load_model(made.base)["lm_head.weight"]
    assert (merged[1] - base).norm() > 10 * (merged[0] - base).norm()
