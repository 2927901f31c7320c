"""Every registered method keeps the promises of the contract suite, which finds each way to break one."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_methods import BROKEN, Sound
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergefs.catalog import Catalog
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import BF16, F16, F32
from mergefs.kernels.precision import Precision, store
from mergefs.methods.contract import MagnitudeRescale, MagnitudeThreshold, TensorContext
from mergefs.methods.registry import METHODS
from mergefs.sources.ledger import Ledger
from mergefs.sources.place import StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.service import StatisticsService
from mergefs.testing import CHECKS, ContractError, check_method
from mergefs.testing.answers import answer
from mergefs.testing.cases import Case


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_built_in_method_keeps_its_promises(name: str, check: str) -> None:
    CHECKS[check](METHODS[name])


@pytest.mark.parametrize("hypothesis", [True, False], ids=["with hypothesis", "without"])
def test_a_method_that_keeps_every_promise_passes(hypothesis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hypothesis:
        monkeypatch.setitem(sys.modules, "hypothesis", None)
    check_method(Sound())


@pytest.mark.parametrize("hypothesis", [True, False], ids=["with hypothesis", "without"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found_and_said(name: str, hypothesis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hypothesis:
        monkeypatch.setitem(sys.modules, "hypothesis", None)
    broken = BROKEN[name]
    with pytest.raises(ContractError) as caught:
        CHECKS[broken.check](broken.make())
    assert broken.words in str(caught.value)


def test_a_violation_is_said_with_the_smallest_tensor_that_shows_it() -> None:
    with pytest.raises(ContractError) as caught:
        CHECKS["ranges"](BROKEN["place"].make())
    assert str(caught.value).startswith("sound: the ranges between [0, ")
    assert (
        "; for a tensor 'model.layers.0.mlp.up_proj.weight' of shape [13] in BF16, from base of weights, with "
        in str(caught.value)
    )


# The plain definitions of statistics, against those that stream over files


@given(data=st.data())
@settings(max_examples=40)
def test_the_statistics_in_memory_are_those_that_the_service_gathers(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, catalogs: Path
) -> None:
    compute = data.draw(st.sampled_from([BF16, F16, F32]))
    size = data.draw(st.integers(1, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    few = data.draw(st.booleans())
    places, raws = [], []
    for _ in range(2):
        values = generator.integers(-3, 4, size) / 8 if few else generator.standard_normal(size)
        raw = store(Precision(compute).round(values.astype(np.float32)), compute, compute)
        directory = tmp_path_factory.mktemp("model")
        tensor = torch.from_numpy(raw.copy()).view(getattr(torch, compute.torch_name))
        save_file({"weight": tensor}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        places.append(StoredTensor.of(open_checkpoint(directory), "weight"))
        raws.append(raw)
    context = TensorContext("weight", size, size, 1, compute, 1, 2, {}, ({}, {}), 0)
    case = Case(context, (size,), tuple(raws), ("weights", "weights"))
    keep = data.draw(st.integers(1, size))
    wanted = (MagnitudeThreshold(0, keep), MagnitudeRescale(0, keep, data.draw(st.integers(0, keep - 1))))
    with Catalog(Path(tempfile.mkdtemp(dir=catalogs))) as catalog:
        reader = SourceReader(Ledger())
        try:
            found = StatisticsService(catalog, reader).answers(wanted, tuple(places), 1, compute).values
        finally:
            reader.close()
    threshold, rescale = wanted
    assert answer(threshold, case) == found[threshold]
    assert answer(rescale, case) == pytest.approx(found[rescale], rel=1e-15)
