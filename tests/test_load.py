"""A mount under load: many readers at once, some of them killed, over a slow disk; without memory; on a full disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_load import LoadedModels, load, loaded_models

pytestmark = pytest.mark.mounts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModels]:
    with loaded_models(tmp_path_factory.mktemp("load"), delay=0.005) as made:
        yield made


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.heavy)])
def test_many_processes_read_random_pages_of_many_variants(
    models: LoadedModels, tmp_path: Path, seconds: float
) -> None:
    """In five seconds, nearly all find tensors that nobody has read before; later most have been."""
    figures = load(models, tmp_path, seconds, readers=16, threads=4)
    print(figures)
    assert figures.failures == []
