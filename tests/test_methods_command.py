"""``mergefs methods`` says what every method declares."""

import json
from pathlib import Path

import pytest
from packages import MEAN, install, use

from mergefs.cli import main
from mergefs.methods.registry import METHODS
from mergefs.recipe.model import parse_recipe
from mergefs.testing.choices import Choices
from mergefs.testing.trial import Trial, for_each_trial

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def test_every_method_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == list(METHODS)
    assert all(one["summary"].endswith(".") and one["reference"].startswith("https://") for one in listed)
    assert {one["package"] for one in listed} == {None}
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    for name, method in METHODS.items():
        # Where nobody looks at a terminal, no line is wrapped.
        assert any(name in line.split() and method.specification.summary in line for line in table.splitlines())


@EVERY_METHOD
def test_a_method_is_explained_with_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    specification = METHODS[name].specification
    assert main(["methods", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{specification.title}: {specification.summary}")
    assert f"needs to know    {specification.needs or 'nothing: '}" in said
    assert "missing tensors  merged from the models that have them" in said
    for parameter in specification.parameters:
        assert f" {parameter.name} " in said
        assert parameter.meaning
    assert main(["methods", name, "--json"]) == 0
    declared = json.loads(capsys.readouterr().out)["parameters"]
    assert {one["name"]: (one["required"], one["default"]) for one in declared} == {
        parameter.name: (parameter.required, parameter.default) for parameter in specification.parameters
    }


@EVERY_METHOD
def test_the_example_of_a_method_is_a_recipe_that_uses_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name, "--json"]) == 0
    example = json.loads(capsys.readouterr().out)["example"]
    assert parse_recipe(example, "example").method == name
    assert main(["methods", name]) == 0
    shown = capsys.readouterr().out
    assert "".join(f"    {line}\n" for line in example.splitlines()) in shown


@EVERY_METHOD
def test_what_a_method_says_that_it_needs_it_asks_for(name: str) -> None:
    asked = []

    def body(trial: Trial, choices: Choices) -> None:
        asked.append(bool(trial.statistics()))

    for_each_trial(METHODS[name], body)
    assert any(asked) == bool(METHODS[name].specification.needs)


def test_an_unknown_method_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "tries"]) == 2
    assert capsys.readouterr().err == "mergefs: error: there is no merge method 'tries'; did you mean 'ties'?\n"
    assert main(["methods", "?"]) == 2
    assert "`mergefs methods` lists those that there are" in capsys.readouterr().err


def test_methods_of_other_packages_are_listed_with_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "raise RuntimeError('no')", distribution="broken-merge", entry_points={"bad": "broken_merge:X"})
    use(monkeypatch, install(tmp_path))
    assert main(["methods"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["mean", "example-merge", "1.0", "The", "mean", "of", "the", "models."] in lines
    assert any(line[:2] == ["ties", "mergefs"] for line in lines)
    assert shown.err == (
        "mergefs: note: merge method 'bad' of broken-merge 1.0 cannot be used, because broken_merge:X fails "
        "(RuntimeError: no); repair broken-merge, or uninstall it\n"
    )
    assert main(["methods", "--json"]) == 0
    last = json.loads(capsys.readouterr().out)[-1]
    assert (last["name"], last["package"], last["package_version"]) == ("mean", "example-merge", "1.0")


def test_a_method_of_another_package_is_explained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, install(tmp_path, MEAN.replace("parameters=(),", "parameters=(), max_models=3,")))
    assert main(["methods", "mean"]) == 0
    said = capsys.readouterr().out
    assert "from             example-merge 1.0\n" in said
    assert "models           1 to 3, the base among them\n" in said
    assert "It has no parameters.\n" in said


def test_a_method_that_cannot_be_used_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, install(tmp_path, "METHOD = 1"))
    assert main(["methods", "mean"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mergefs: error: merge method 'mean' of example-merge 1.0 cannot be used, because ")
    assert said.count("\n") == 1
