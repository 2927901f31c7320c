"""``mergefs methods`` says what every method declares."""

import json

import pytest

from mergefs.cli import main
from mergefs.methods.registry import METHODS


def test_every_method_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == list(METHODS)
    assert all(one["summary"].endswith(".") and one["reference"].startswith("https://") for one in listed)
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    for name, method in METHODS.items():
        # Where nobody looks at a terminal, no line is wrapped.
        assert any(name in line.split() and method.specification.summary in line for line in table.splitlines())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained_with_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    specification = METHODS[name].specification
    assert main(["methods", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{specification.title}: {specification.summary}")
    for parameter in specification.parameters:
        assert f" {parameter.name} " in said
        assert parameter.meaning
    assert main(["methods", name, "--json"]) == 0
    declared = json.loads(capsys.readouterr().out)["parameters"]
    assert {one["name"]: (one["required"], one["default"]) for one in declared} == {
        parameter.name: (parameter.required, parameter.default) for parameter in specification.parameters
    }


def test_an_unknown_method_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "tries"]) == 2
    said = capsys.readouterr().err
    assert "there is no merge method 'tries'" in said
    assert "mergefs methods" in said
