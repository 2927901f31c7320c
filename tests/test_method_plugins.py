"""Merge methods of other packages: found when they are asked for, refused in a sentence, never in the way."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import Families, FamilyKind
from mounting import environment, mounted_recipes, run_mergefs
from packages import MEAN, install, use
from recipes import Merge, recipe_document, write_document
from tensors import bits, load_model

import mergefs
from mergefs.cli import main
from mergefs.errors import MethodError, RecipeError
from mergefs.methods import registry
from mergefs.methods.registry import (
    METHODS,
    find_method,
    get_method,
    method_names,
    method_origin,
    registered_methods,
    specification,
)
from mergefs.recipe.model import parse_recipe
from mergefs.testing import ContractError, check_method

RECIPE = "merge_method: mean\nmodels:\n- model: first\n- model: second\n"


def problem(name: str = "mean") -> str:
    """Return why a method cannot be used, which must be one line."""
    with pytest.raises(MethodError) as caught:
        find_method(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_method_of_another_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_method("mean") is None
    use(monkeypatch, install(tmp_path))
    found = find_method("mean")
    assert found is not None
    assert str(found.origin) == "example-merge 1.0" == str(method_origin("mean"))
    assert get_method("mean") is found.method
    assert found.method.specification.title == "Mean"
    assert method_names() == (*METHODS, "mean")
    assert parse_recipe(RECIPE, "r.yml").method == "mean"
    usable, problems = registered_methods()
    assert [one.method.specification.name for one in usable] == [*METHODS, "mean"]
    assert [one.origin for one in usable if one.origin] == [found.origin]
    assert problems == ()


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (MEAN, "example_merge:Mean"),
        (MEAN + "\ndef make():\n    return METHOD\n", "example_merge:make"),
        (MEAN + "\nclass Box:\n    method = METHOD\n", "example_merge:Box.method"),
    ],
)
def test_an_entry_point_may_name_a_class_or_a_function_that_makes_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, value: str
) -> None:
    use(monkeypatch, install(tmp_path, source, entry_points={"mean": value}))
    assert get_method("mean").specification.title == "Mean"


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("import no_such_library", "example_merge:METHOD", "fails (ModuleNotFoundError: No module named"),
        ("raise ValueError('one\\n  two' + 999 * '.')", "example_merge:METHOD", "fails (ValueError: one two..."),
        ("import sys; sys.exit(3)", "example_merge:METHOD", "example_merge:METHOD fails (SystemExit: 3)"),
        ("", "example_merge:METHOD", "fails (AttributeError"),
        ("METHOD = 7", "example_merge:METHOD", "is neither a Method nor a function"),
        ("def METHOD(): return 7", "example_merge:METHOD", "is neither a Method nor a function"),
        ("def METHOD(argument): return 7", "example_merge:METHOD", "fails (TypeError: METHOD() missing"),
        (MEAN.replace('name="mean"', 'name="average"'), "example_merge:METHOD", "is called 'mean' and its spec"),
        (MEAN + "\nMean.specification = None", "example_merge:METHOD", "the specification of example_merge:METHOD"),
        (MEAN + "\nfrom mergefs.methods.contract import Method as METHOD", "example_merge:METHOD", "fails (TypeErr"),
    ],
)
def test_what_is_no_method_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, value: str, reason: str
) -> None:
    use(monkeypatch, install(tmp_path, source, entry_points={"mean": value}))
    said = problem()
    assert said.startswith("merge method 'mean' of example-merge 1.0 cannot be used, because ")
    assert said.endswith("; repair example-merge, or uninstall it")
    assert reason in said
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, "r.yml")
    assert str(caught.value) == f"r.yml:1: {said}"


def test_a_broken_package_breaks_no_recipe_that_does_not_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "raise RuntimeError", distribution="broken-merge")
    install(tmp_path, MEAN.replace('"mean"', '"other"'), entry_points={"other": "example_merge:METHOD"})
    use(monkeypatch, tmp_path)
    assert get_method("other").specification.name == "other"
    usable, problems = registered_methods()
    assert [one.method.specification.name for one in usable] == [*METHODS, "other"]
    assert [str(one) for one in problems] == [problem("mean")]
    for said, method, parameters in (
        ("'wieght' is not a parameter of linear; did you mean 'weight'?", "linear", "{wieght: 1}"),
        ("'x' is not a parameter of other; other takes none", "other", "{x: 1}"),
        ("'meam' is not a merge_method; did you mean 'mean'?", "meam", "{}"),
    ):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(f"merge_method: {method}\nmodels: [{{model: m, parameters: {parameters}}}]", "r.yml")
        assert said in str(caught.value)


def test_damaged_metadata_of_a_package_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    damaged = tmp_path / "damaged-1.0.dist-info"
    damaged.mkdir()
    (damaged / "entry_points.txt").write_text("[mergefs.methods]\nno equals sign\n")
    use(monkeypatch, tmp_path)
    assert get_method("mean").specification.name == "mean"


def test_a_package_cannot_take_the_name_of_a_built_in_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MEAN.replace('name="mean"', 'name="ties"')
    use(monkeypatch, install(tmp_path, source, entry_points={"ties": "example_merge:METHOD"}))
    assert get_method("ties") is METHODS["ties"]
    assert method_origin("ties") is None
    usable, problems = registered_methods()
    assert len(usable) == len(METHODS)
    assert [str(one) for one in problems] == [
        "merge method 'ties' of example-merge 1.0 cannot be used, because a built-in method has that name; give it "
        "another name"
    ]


def test_two_packages_cannot_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    use(monkeypatch, install(tmp_path, distribution="other-merge", version="2.0"))
    assert problem() == (
        "merge method 'mean' is registered by example-merge 1.0 and other-merge 2.0; uninstall all but one of them"
    )


def test_of_two_installations_of_a_package_the_first_on_the_path_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, install(tmp_path / "one", version="2.0"), install(tmp_path / "two", version="1.0"))
    assert str(method_origin("mean")) == "example-merge 2.0"


def test_a_method_that_nobody_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert specification("no_such") is None
    assert method_origin("no_such") is None
    assert problem_of_getting("no_such").startswith("there is no merge method 'no_such'")


def problem_of_getting(name: str) -> str:
    with pytest.raises(MethodError) as caught:
        get_method(name)
    return str(caught.value)


def test_built_in_methods_are_found_without_a_look_at_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the packages were looked at")

    monkeypatch.setattr(registry, "plugins", refuse)
    for name, method in METHODS.items():
        assert get_method(name) is method
        assert method_origin(name) is None
    parse_recipe(RECIPE.replace("mean", "task_arithmetic") + "base_model: base\nparameters: {weight: 1}", "r.yml")


# Used from end to end


@pytest.fixture
def recipe(tmp_path: Path, families: Families) -> Path:
    """A recipe that uses the method of the package."""
    document = recipe_document(Merge("mean", ({}, {})), families(FamilyKind(torch.float32)))
    return write_document(tmp_path / "recipe.yml", document)


def test_a_foreign_method_merges_and_its_package_is_part_of_the_plan(
    tmp_path: Path, families: Families, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families(FamilyKind(torch.float32))
    ids = []
    for version in ("1.0", "1.1"):
        with monkeypatch.context() as patch:
            use(patch, install(tmp_path / version, version=version))
            with mergefs.open(recipe) as model:
                ids.append(model.plan.plan_id)
                name = "model.layers.0.mlp.up_proj.weight"
                merged = model.get_tensor(name)
    inputs = [load_model(path)[name] for path in (*family.experts, family.base)]
    expected = (inputs[0] + inputs[1] + inputs[2]) / 3
    assert torch.equal(bits(merged), bits(expected))
    assert ids[0] != ids[1]


def test_the_command_materializes_and_verifies_with_it(tmp_path: Path, recipe: Path) -> None:
    site = install(tmp_path / "site")
    variables = environment(tmp_path / "state")
    variables["PYTHONPATH"] = f"{site}:{variables['PYTHONPATH']}"
    for arguments in (["materialize", recipe, tmp_path / "out"], ["verify", "--deep", tmp_path / "out"]):
        command = [sys.executable, "-m", "mergefs.cli", *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_without_its_package_a_recipe_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "'mean' is not a merge_method" in said
    assert said.count("\n") == 1


def test_a_mount_serves_what_a_foreign_method_merges(tmp_path: Path, recipe: Path) -> None:
    extra = {"PYTHONPATH": f"{install(tmp_path / 'site')}:{environment(tmp_path)['PYTHONPATH']}"}
    assert run_mergefs("materialize", recipe, tmp_path / "out", state=tmp_path, extra=extra).returncode == 0
    with mounted_recipes(recipe, mountpoint=tmp_path / "mnt", state=tmp_path / "state", extra=extra) as mount:
        name = "model.safetensors"
        assert (mount.mountpoint / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_bug_of_a_foreign_method_is_not_said_to_be_ours(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    use(monkeypatch, install(tmp_path / "site", MEAN.replace("return context.models\n", "return 1 // 0\n")))
    assert main(["materialize", str(recipe), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "mergefs: error: a merge method of example-merge 1.0 failed (ZeroDivisionError: integer division or modulo by "
        "zero); this is a bug of that package, and "
    )
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


KERNEL = """
from mergefs.kernels.fused import types

from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded


def _halved(result, address):
    for i in range(result.size):
        result[i] = narrowed(rounded(loaded(address, i, result) * FACTOR, result), result)


KERNEL = Kernel(_halved, lambda element: types.void(types.Array(element, 1, "C"), types.uint64))
"""

HALF = (
    MEAN.replace('name="mean"', 'name="half"').replace("parameters=(),", "parameters=(), max_models=1,")
    + """

class Half(Mean):
    def reference(self, block, coefficients, precision):
        return precision.round(block.inputs[0] * precision.carrier(0.5))

    def response(self, context, answers):
        return Response.known([0.0 if context.base == 0 else 0.5], offset=-0.5)

    def kernels(self):
        return ("example_package.kernel",)

    def fused(self, run, coefficients):
        from mergefs.kernels.fused import FUSED_DTYPES
        from mergefs.kernels.fused.memory import address, empty_result
        from example_package.kernel import KERNEL

        if run.dtype not in FUSED_DTYPES:
            return None
        result = empty_result(run.inputs[0], run.dtype)
        KERNEL.compiled(run.dtype)(result, address(run.inputs[0]))
        return result.view("u1")


METHOD = Half()
"""
)


@pytest.mark.parametrize("factor", ["np.float32(0.5)", "np.float32(0.25)"])
def test_a_foreign_method_may_have_a_kernel_of_its_own(
    factor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "example_package").mkdir()
    (tmp_path / "example_package" / "__init__.py").write_text("")
    (tmp_path / "example_package" / "kernel.py").write_text("import numpy as np\n" + KERNEL.replace("FACTOR", factor))
    use(monkeypatch, install(tmp_path, HALF, entry_points={"half": "example_merge:METHOD"}))
    for module in ("example_package", "example_package.kernel"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    if factor.endswith("(0.5)"):
        check_method(get_method("half"))
    else:
        with pytest.raises(ContractError, match="the fused kernel differs from the reference"):
            check_method(get_method("half"))
