"""Whatever a recipe says, it is planned and can be read, or is refused in one sentence, as what mergekit refuses is."""

import contextlib
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get as registered
from oracle import mergekit_merge, mergekit_multi
from recipe_grammar import random_recipe
from refused_configs import HERE, REFUSED, SOUND
from tensors import differing, merge_by_mergefs
from tokenizers_recipes import build_in_this_process
from worlds import World, make_world

import mergefs
from mergefs.cli import main
from mergefs.methods.contract import BasePolicy, Specification
from mergefs.methods.registry import METHODS
from mergefs.recipe.model import Recipe
from mergefs.recipe.settings import Conditions, Gradient, Setting
from mergefs.tokenizer import service


@dataclass(frozen=True, slots=True)
class Workshop:
    """Models, a place for a recipe, and a catalog."""

    world: World
    recipe: Path
    catalog: Path

    def plan(self) -> tuple[int, str]:
        """Plan the recipe by the real command, and return its exit status and what it says on stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["--catalog", str(self.catalog), "plan", str(self.recipe)])
        assert status == 0 or out.getvalue() == ""
        return status, err.getvalue()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, catalogs: Path) -> Iterator[Workshop]:
    directory = tmp_path_factory.mktemp("fuzzed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "run_builder", build_in_this_process)
        patch.chdir(directory)
        yield Workshop(make_world(directory), directory / "recipe.yml", catalogs / "fuzzed")


def assert_one_sentence(stderr: str) -> None:
    assert stderr.startswith("mergefs: error: "), stderr
    assert stderr.endswith("\n"), stderr
    assert stderr[:-1].isprintable(), repr(stderr)
    assert "Traceback" not in stderr
    assert "internal error" not in stderr, stderr
    assert len(stderr) < 3000, stderr


def largest(setting: Setting) -> float:
    """Return the largest number in a setting."""
    if isinstance(setting, Gradient):
        return max(float(value) for value in setting.values)
    if isinstance(setting, Conditions):
        return max(largest(condition.value) for condition in setting.conditions)
    return float(setting)


def longest_walk(recipe: Recipe) -> float:
    """Return how many steps towards a Karcher mean a recipe, or one that it merges the result of, may take."""
    own = [largest(settings["max_iter"]) for settings in recipe.settings() if "max_iter" in settings]
    return max([0.0, *own, *(longest_walk(inner) for inner in recipe.inner.values())])


def assert_answered(workshop: Workshop, data: bytes, chance: random.Random) -> int:
    """Plan a recipe; where that succeeds, read a few ranges. Return the exit status."""
    workshop.recipe.write_bytes(data)
    status, stderr = workshop.plan()
    if status == 0:
        assert stderr == ""
        with mergefs.open(workshop.recipe, catalog=workshop.catalog) as model:
            if longest_walk(model.plan.recipe) > LONGEST_WALK:
                return status
            for name, size in model.files.sizes.items():
                start = chance.randrange(size + 1)
                length = min(chance.randrange(2000), size - start)
                assert len(model.read_file(name, start, length)) == length
    else:
        assert status in (1, 2)
        assert_one_sentence(stderr)
    return status


LONGEST_WALK = 100
"""Steps towards a Karcher mean that are waited for: with a tolerance of 0 it takes all that a recipe asks for."""

# What NumPy warns of would stand on stderr.
NO_WARNINGS = pytest.mark.filterwarnings("error::RuntimeWarning")
SEEDS = st.integers(0, 2**64 - 1)


@NO_WARNINGS
@settings(max_examples=150)
@given(seed=SEEDS)
def test_a_random_recipe_is_planned_and_read_or_refused_in_one_sentence(workshop: Workshop, seed: int) -> None:
    assert_answered(workshop, random_recipe(workshop.world, seed), random.Random(seed))


@NO_WARNINGS
@pytest.mark.heavy
@settings(max_examples=2500)
@given(seed=SEEDS)
def test_many_random_recipes_are_planned_and_read_or_refused_in_one_sentence(workshop: Workshop, seed: int) -> None:
    assert_answered(workshop, random_recipe(workshop.world, seed), random.Random(seed))


# What they found


@NO_WARNINGS
def test_an_expert_that_changes_nothing_takes_no_part_whatever_counts_as_a_change(tmp_path: Path) -> None:
    """With an epsilon of 0 its shared part was 0 / 0, and made NaN of all others."""
    world = make_world(tmp_path)
    unchanged = {"name": "unchanged", "merge_method": "passthrough", "models": [{"model": str(world.base)}]}
    document = {
        "merge_method": "ramplus_tl",
        "base_model": str(world.base),
        "models": [{"model": str(world.first)}],
        "parameters": {"epsilon": 0.0, "r": 1.5},
    }
    alone = merge_by_mergefs(tmp_path, document)
    together = merge_by_mergefs(
        tmp_path, [unchanged, document | {"models": [{"model": str(world.first)}, {"model": "unchanged"}]}]
    )
    assert all(bool(tensor.isfinite().all()) for tensor in alone.values())
    assert differing(together, alone) == {}


@NO_WARNINGS
def test_weights_whose_shares_are_no_numbers_do_not_keep_a_reader_waiting(workshop: Workshop) -> None:
    """Statistics of multislerp were asked for by weights of NaN, which equal nothing, again and again."""
    document = with_models(METHODS["multislerp"].specification, workshop.world, 2, base=False, weight=1e300)
    assert assert_answered(workshop, yaml.safe_dump(document).encode(), random.Random(1)) == 0


# Configs that mergekit refuses


def filled(text: str, world: World) -> str:
    """Return a config with the models of a world in it."""
    for name in ("base", "first", "second", "adapter", "foreign"):
        text = text.replace(name.upper(), str(getattr(world, name)))
    return text


def refusal_of_mergekit(text: str, directory: Path) -> str:
    """Return what mergekit says about a config, nothing where it merges."""
    try:
        documents = list(yaml.safe_load_all(text)) or [None]
        if len(documents) > 1:
            mergekit_multi(documents)
        elif isinstance(documents[0], dict):
            mergekit_merge(documents[0], lora_merge_cache=str(directory / "adapted"), copy_tokenizer=True)
        else:
            MergeConfiguration.model_validate(documents[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def our_refusal(workshop: Workshop, text: str) -> str:
    """Return our sentence about a config, without what every one begins with."""
    workshop.recipe.write_text(text)
    status, stderr = workshop.plan()
    assert status == 1, "the recipe was not refused"
    assert_one_sentence(stderr)
    return stderr.removeprefix("mergefs: error: ").rstrip("\n")


def guilty_line(text: str) -> int | None:
    """Return the number of the line that is marked."""
    return next((number for number, line in enumerate(text.splitlines(), 1) if line.endswith(HERE)), None)


def assert_named_with_a_remedy(workshop: Workshop, sentence: str, line: int | None) -> None:
    assert line is None or sentence.startswith(f"{workshop.recipe}:{line}: "), sentence
    assert re.search(r"; \w", sentence), f"no remedy: {sentence}"


@pytest.mark.parametrize("name", SOUND)
def test_what_the_refused_configs_are_changes_of_is_taken_by_both(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    text = filled(SOUND[name], workshop.world)
    assert refusal_of_mergekit(text, tmp_path) == ""
    workshop.recipe.write_text(text)
    assert workshop.plan() == (0, "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_mergekit_refuses_is_refused_with_line_and_remedy(workshop: Workshop, tmp_path: Path, name: str) -> None:
    refused = REFUSED[name]
    text = filled(refused.text, workshop.world)
    assert re.search(refused.theirs, refusal_of_mergekit(text, tmp_path))
    sentence = our_refusal(workshop, text)
    assert re.search(refused.words, sentence), sentence
    assert_named_with_a_remedy(workshop, sentence, guilty_line(text))


# What each method declares


def with_models(method: Specification, world: World, number: int, base: bool, **parameters: Any) -> dict[str, Any]:
    """Return a recipe of a method with so many models beside the base, and the parameters that it must have."""
    models = [str(world.first), str(world.second), world.adapted, str(world.foreign)][:number]
    needed = {parameter.name: 0.5 for parameter in method.parameters if parameter.required}
    document: dict[str, Any] = {"merge_method": method.name, "models": [{"model": model} for model in models]}
    return document | ({"base_model": str(world.base)} if base else {}) | {"parameters": needed | parameters}


def takes(method: Specification, number: int, base: bool) -> bool:
    """Return whether mergekit's method takes so many models beside a base."""
    models = [f"model {index}" for index in range(number)] + ["base"] * base
    try:
        registered(method.name).validate_inputs(models, "base" if base else None)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("base", [True, False], ids=["with a base", "without"])
@pytest.mark.parametrize("name", METHODS)
def test_a_number_of_models_that_a_method_of_mergekit_does_not_take_is_refused(
    workshop: Workshop, tmp_path: Path, name: str, base: bool
) -> None:
    method = METHODS[name].specification
    refused = [number for number in (1, 2, 3) if not takes(method, number, base)]
    for number in refused:
        document = with_models(method, workshop.world, number, base)
        text = yaml.safe_dump(document)
        assert re.search("requires|Duplicate", refusal_of_mergekit(text, tmp_path))
        sentence = our_refusal(workshop, text)
        assert f"merge_method {name} " in sentence
        assert re.match(rf"{re.escape(str(workshop.recipe))}:\d+: ", sentence)
        assert_named_with_a_remedy(workshop, sentence, None)
    assert refused or method.min_models < 2


PARAMETERS = [
    (name, parameter.name) for name, method in METHODS.items() for parameter in method.specification.parameters
]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=[f"{name}-{one}" for name, one in PARAMETERS])
def test_a_value_that_a_parameter_of_mergekit_does_not_take_is_refused(
    workshop: Workshop, tmp_path: Path, name: str, parameter: str
) -> None:
    method = METHODS[name].specification
    declared = method.parameter(parameter)
    assert declared is not None
    number = max(method.min_models - 1, method.min_experts, 1)
    for value in [
        "perhaps",
        "",
        1e400 if declared.kind == "int" else "0.5.5",
        *([2.5] if declared.kind != "float" else []),
    ]:
        document = with_models(
            method, workshop.world, number, method.base is not BasePolicy.AS_INPUT, **{parameter: value}
        )
        text = yaml.safe_dump(document)
        assert "ValidationError" in refusal_of_mergekit(text, tmp_path)
        sentence = our_refusal(workshop, text)
        assert f"{parameter!r} must be " in sentence
        line = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{parameter}:"))
        assert_named_with_a_remedy(workshop, sentence, line)


REQUIRED = [
    (name, one) for name, one in PARAMETERS if getattr(METHODS[name].specification.parameter(one), "required", 0)
]


@pytest.mark.parametrize(("name", "parameter"), REQUIRED, ids=[name for name, _ in REQUIRED])
def test_a_parameter_that_mergekit_needs_is_needed(
    workshop: Workshop, tmp_path: Path, name: str, parameter: str
) -> None:
    method = METHODS[name].specification
    number = max(method.min_models - 1, method.min_experts, 1)
    document = with_models(method, workshop.world, number, method.base is not BasePolicy.AS_INPUT)
    del document["parameters"][parameter]
    text = yaml.safe_dump(document)
    assert "Missing required parameter" in refusal_of_mergekit(text, tmp_path)
    sentence = our_refusal(workshop, text)
    assert f"merge_method {name} needs the parameter {parameter!r}" in sentence
    assert re.match(rf"{re.escape(str(workshop.recipe))}:\d+: ", sentence)
    assert_named_with_a_remedy(workshop, sentence, None)


@NO_WARNINGS
@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=[f"{name}-{one}" for name, one in PARAMETERS])
def test_a_value_at_an_extreme_is_planned_and_read_or_refused(workshop: Workshop, name: str, parameter: str) -> None:
    """A number that no dtype holds made NumPy warn on stderr, where ``mergefs plan`` said nothing else."""
    method = METHODS[name].specification
    number = max(
        method.min_models - 1, method.min_experts, min(method.max_experts or 2, (method.max_models or 3) - 1), 1
    )
    for value in (1e300, -1e300, 5e-324, 0.0):
        document = with_models(
            method, workshop.world, number, method.base is not BasePolicy.AS_INPUT, **{parameter: value}
        )
        assert_answered(workshop, yaml.safe_dump(document).encode(), random.Random(1))
