"""What all tests share: a user's state of their own for each, and models and merges that are made once."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports a library that reads them.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

import pytest
from checkpoints import Family, family
from examples import Families, FamilyKind
from hypothesis import HealthCheck, settings
from mounting import clear_mounts_below

# How long an example takes says more about the machine than about the code. In CI the examples are always the same.
settings.register_profile(
    "mergefs",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mergefs")


# Whoever starts the tests may ignore these, as nohup and shells do in the background, and programs would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a run fail in CI that has skipped something: there, everything must be tested."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("tests were skipped, which must not be in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def catalogs() -> Iterator[Path]:
    """Give the directory of all catalogs, in memory where the system has such a place.

    A catalog is synced to disk with each record, which a thousand tests would spend minutes on.
    """
    memory = Path("/dev/shm")
    place = tempfile.mkdtemp(prefix="mergefs-tests-", dir=memory if os.access(memory, os.W_OK) else None)
    yield Path(place)
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def own_state(
    catalogs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Keep the user's catalog, logs and caches out of every test, and each test's out of the others'."""
    catalog = Path(tempfile.mkdtemp(dir=catalogs))
    home = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setenv("MERGEFS_CATALOG", str(catalog))
    for variable in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(home / variable.lower()))
    yield
    shutil.rmtree(catalog)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """Return a function that writes a family of a kind, once in a session."""
    made: dict[FamilyKind, Family] = {}

    def make(kind: FamilyKind) -> Family:
        if kind not in made:
            made[kind] = family(
                tmp_path_factory.mktemp(kind.text),
                experts=kind.experts,
                dtype=kind.dtype,
                tied=kind.tied,
                shards=kind.shards,
                hidden=kind.hidden,
                layers=kind.layers,
                vocabulary=kind.vocabulary,
            )
        return made[kind]

    return make


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in which no test may leave a mount."""
    yield tmp_path
    assert clear_mounts_below(tmp_path) == []
