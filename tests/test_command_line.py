"""The ``mergefs`` command itself: its help, its options, and its one rule for errors."""

import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
from mounting import environment, run_mergefs

from mergefs import __version__
from mergefs.cli import main, status
from mergefs.cli.registry import COMMANDS, Entry
from mergefs.cli.settings import Settings
from mergefs.errors import RecipeError, UsageError
from mergefs.mount import mountinfo


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what a run leaves for the user in ``tmp_path``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("MERGEFS_CATALOG", raising=False)
    return tmp_path


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch, state: Path) -> list[object]:
    """Register a command ``act`` that raises the first thing of this list, or keeps its settings there."""
    actions: list[object] = []

    @click.command()
    @click.pass_obj
    def command(settings: Settings) -> None:
        if actions and isinstance(actions[0], BaseException):
            raise actions[0]
        actions.append(settings)

    module = types.ModuleType("acting_for_a_test")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "act", Entry(module.__name__, "command", "Act."))
    return actions


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main([option]) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert f"  {name} " in shown
        assert entry.summary in " ".join(shown.split())


def test_help_imports_no_command_and_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from mergefs.cli import main; main(['--help'])\nprint(*sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(tmp_path), check=True
    )
    loaded = set(result.stderr.split())
    assert "click" in loaded
    heavy = {"torch", "numpy", "numba", "lmdb", "rich", "pydantic", "yaml", "fuse", "mfusepy", "logging"}
    assert loaded & (heavy | {entry.module for entry in COMMANDS.values()}) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: mergefs {name} ")


def test_the_command_that_forks_a_server_loads_nothing_that_a_fork_would_break(tmp_path: Path) -> None:
    code = (
        "import sys, os; from mergefs.cli import main\n"
        "os.fork = lambda: (print(*sorted(sys.modules), file=sys.stdout), os._exit(0))\n"
        "main(['mount', 'recipe.yml', sys.argv[1]])"
    )
    (tmp_path / "mnt").mkdir()
    result = subprocess.run(
        [sys.executable, "-u", "-c", code, tmp_path / "mnt"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    loaded = set(result.stdout.split())
    assert "mergefs.mount.daemon" in loaded
    assert (
        loaded & {"torch", "numpy", "numba", "lmdb", "transformers", "mergefs.mount.build", "mergefs.engine"} == set()
    )


@pytest.mark.parametrize("module", ["mergefs", "mergefs.cli"])
def test_it_runs_as_a_module_and_knows_its_version(tmp_path: Path, module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    assert result.stdout == f"mergefs {__version__}\n"


def test_the_global_options_reach_the_command_as_absolute_paths(
    act: list[object], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(state)
    assert main(["--catalog", "here/../catalog", "-v", "--log-file", "run.log", "act"]) == 0
    assert act == [Settings(catalog=state / "catalog", verbose=True, log_file=state / "run.log")]


def test_the_catalog_may_come_from_the_environment(
    act: list[object], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEFS_CATALOG", str(state / "elsewhere"))
    assert main(["act"]) == 0
    assert act == [Settings(catalog=state / "elsewhere", verbose=False, log_file=None)]


@pytest.mark.parametrize(
    ("error", "exit_status"), [(RecipeError("a.yml has no models; name two"), 1), (UsageError("not both"), 2)]
)
def test_an_error_for_people_is_one_sentence_and_its_exit_status(
    act: list[object], capsys: pytest.CaptureFixture[str], error: Exception, exit_status: int
) -> None:
    act.append(error)
    assert main(["act"]) == exit_status
    assert capsys.readouterr() == ("", f"mergefs: error: {error}\n")


@pytest.mark.parametrize("arguments", [["act", "--wrong"], ["acct"], ["--wrong"], ["mount"], ["mount", "only-one"]])
def test_wrong_usage_has_exit_status_2(
    act: list[object], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage: mergefs" in shown.err


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mout"]) == 2
    assert "no such command: 'mout'; did you mean 'mount'?" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["much", "-1", "0", "5 parsecs"])
def test_a_size_that_is_none_is_wrong_usage(capsys: pytest.CaptureFixture[str], state: Path, size: str) -> None:
    assert main(["mount", f"--cache-size={size}", "a.yml", str(state)]) == 2
    assert "--cache-size" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(act: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    act.append(KeyboardInterrupt())
    assert main(["act"]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err.strip()) == ("", "mergefs: interrupted")


def test_a_bug_is_one_sentence_and_its_traceback_a_file(
    act: list[object], capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    act.append(ZeroDivisionError("division by zero"))
    assert main(["act"]) == 1
    (log,) = state.rglob("*.log")
    assert capsys.readouterr().err == (
        "mergefs: error: internal error (ZeroDivisionError: division by zero); this is a bug, "
        f"and {log} has the details\n"
    )
    assert "Traceback" in log.read_text()


def test_a_bug_that_says_much_is_one_line_all_the_same(
    act: list[object], capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    act.append(ValueError("first line\n\n  second line\n" + 10_000 * "x"))
    assert main(["act"]) == 1
    shown = capsys.readouterr().err
    assert "ValueError: first line second line xxx" in shown
    assert shown.count("\n") == 1
    assert len(shown) < 1000


def test_a_bug_is_shown_in_full_to_who_asks_and_kept_in_the_log_they_named(
    act: list[object], capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    act.append(ZeroDivisionError("division by zero"))
    assert main(["--verbose", "--log-file", str(state / "run.log"), "act"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert "Traceback" in (state / "run.log").read_text()


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    # The pipe is closed before anything is written into it.
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from mergefs.cli import main; sys.exit(main(['-h']))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 1


def test_status_says_so_when_nothing_is_mounted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    monkeypatch.setattr(mountinfo, "list_mounts", tuple)
    assert main(["status"]) == 0
    assert capsys.readouterr() == ("Nothing is mounted.\n", "")
    assert main(["status", "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", "")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (200_000, "2 d 7 h"), (None, "-")]
)
def test_a_duration_is_shown_with_its_two_largest_units(seconds: float | None, shown: str) -> None:
    assert status._duration(seconds) == shown


def test_mounting_a_missing_recipe_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    result = run_mergefs("mount", "missing.yml", "mnt", state=tmp_path / "state", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("mergefs: error: ")
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / "missing.yml") in result.stderr
    assert list((tmp_path / "mnt").iterdir()) == []
