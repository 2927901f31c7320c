"""How rows of an adapted tensor are computed: each alone as all together, from bytes that are read once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import (
    Pair,
    applied,
    gpt2,
    layers,
    llama,
    read,
    read_all,
    stack_of_experts,
    train,
    train_module,
    write_adapter,
)
from tensors import load_model

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType
from mergefs.errors import CheckpointError
from mergefs.kernels.arithmetic import fused_multiply_add
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.fused import low_rank as fused
from mergefs.kernels.low_rank import Product, add_product, with_lengths
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.gathered import RowTable, gather_rows
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.place import Place, Role
from mergefs.sources.reader import SourceReader

SPECIAL = np.array([0.0, -0.0, 1e-45, -6e-8, 65504.0, 1e30, -3.4e38, np.inf, -np.inf, np.nan], dtype=np.float32)
NAN_WITH_ONES = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], dtype=np.uint32).view(np.float32)


# The kernel


def values(generator: np.random.Generator, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return values like weights, like small numbers, or of every special kind."""
    drawn = generator.standard_normal(size).astype(np.float32)
    match generator.integers(3):
        case 0:
            return drawn
        case 1:
            return drawn * np.float32(1e-6)
        case _:
            special = generator.choice(np.concatenate([SPECIAL, NAN_WITH_ONES]), size)
            return np.where(generator.random(size) < 0.3, special, drawn)


def bit_patterns(raw: Raw, dtype: DType) -> np.ndarray[Any, Any]:
    """Return bits, with one pattern for all NaN."""
    found = raw.view({16: np.uint16, 32: np.uint32}[dtype.bits]).copy()
    found[np.isnan(load(raw, dtype, dtype))] = 0x7FFF
    return found


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    rank=st.integers(1, 11),
    columns=st.integers(1, 40) | st.sampled_from([1023, 1024, 1025, 2100]),
    scaling=st.sampled_from([1.0, 2.0, 0.3, -0.7, 0.0, 1e-9, 1e30]),
    rounds_delta=st.booleans(),
)
@settings(max_examples=60)
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=lambda dtype: dtype.name)
def test_the_fused_kernel_equals_the_formula(
    dtype: DType, seed: int, rows: int, rank: int, columns: int, scaling: float, rounds_delta: bool
) -> None:
    generator = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        weight = store(values(generator, rows * columns), F32, dtype)
        product = Product(
            values(generator, rows * rank).reshape(rows, rank),
            values(generator, rank * columns).reshape(rank, columns),
            scaling,
        )
        expected = add_product(
            load(weight, dtype, dtype).reshape(rows, columns), product, Precision(dtype), rounds_delta
        )
        got = fused.add_product(weight, dtype, product, rounds_delta)
        assert np.array_equal(bit_patterns(got, dtype), bit_patterns(store(expected.ravel(), dtype, dtype), dtype))


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda dtype: dtype.name)
def test_the_formula_is_one_fused_multiply_add_after_the_other(dtype: DType) -> None:
    generator = np.random.default_rng(7)
    carrier = Precision(dtype).carrier
    left, right = (generator.standard_normal(shape).astype(carrier) for shape in ((3, 5), (5, 4)))
    weight = generator.standard_normal((3, 4)).astype(carrier)
    got = add_product(weight, Product(left, right, 0.7), Precision(dtype), False)
    for row in range(3):
        for column in range(4):
            total = np.zeros(1, dtype=carrier)
            for k in range(5):
                total = fused_multiply_add(right[k, column : column + 1], float(left[row, k]), total)
            assert got[row, column] == weight[row, column] + total[0] * carrier(0.7)


def test_lengths_are_those_that_are_asked_for() -> None:
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((5, 300)).astype(np.float32)
    lengths = np.array([1, 2, 0.5, 0, 7], dtype=np.float32)
    assert np.allclose(np.linalg.norm(with_lengths(rows, lengths), axis=1), lengths, rtol=1e-6)


# Ranges


@dataclass(frozen=True, slots=True)
class Example:
    """A tensor with an adapter applied to it, and its bytes."""

    place: Place
    whole: Raw


def examples(directory: Path) -> Iterator[tuple[str, Pair, str]]:
    """Yield every kind of adapted tensor: a name, its model and adapter, and its name there."""
    bf16, f16 = torch.bfloat16, torch.float16
    base = llama(vocabulary=20000, hidden=64)(directory / "llama", bf16)
    config: dict[str, Any] = {"r": 5, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    pair = train(base, directory / "adapter", **config)
    yield "a projection", pair, "model.layers.0.self_attn.q_proj.weight"
    yield "an embedding of several blocks", pair, "model.embed_tokens.weight"
    yield "a saved tensor", pair, "model.norm.weight"
    dora = train(base, directory / "dora", r=3, target_modules=["down_proj"], use_dora=True)
    yield "DoRA", dora, "model.layers.0.mlp.down_proj.weight"
    tokens = train(base, directory / "tokens", target_modules=["q_proj"], trainable_token_indices=[19999, 0, 8192])
    yield "replaced rows", tokens, "model.embed_tokens.weight"
    gpt = train(
        gpt2()(directory / "gpt", f16), directory / "gpt-adapter", r=3, target_modules=["c_attn"], lora_bias=True
    )
    yield "a Conv1D", gpt, "transformer.h.0.attn.c_attn.weight"
    yield "a bias", gpt, "transformer.h.0.attn.c_attn.bias"
    net = train_module(layers, directory / "net", torch.float64, r=2, target_modules=["plane", "line"])
    yield "a convolution", net, "plane.weight"
    make = stack_of_experts(True, (12, 20), (20, 8))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"r": 3, "target_modules": [], "target_parameters": parameters}
    yield "a stack", train_module(make, directory / "stack", torch.float32, **config), "experts.gate_up_proj"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    found = {}
    reader = SourceReader(Ledger())
    for name, pair, tensor in examples(tmp_path_factory.mktemp("adapted")):
        place = applied(pair)[tensor]
        found[name] = Example(place, place.read(reader, 0, place.elements, Purpose.EXPERT))
    reader.close()
    return found


KINDS = (
    *("a projection", "an embedding of several blocks", "a saved tensor", "DoRA", "replaced rows", "a Conv1D"),
    *("a bias", "a convolution", "a stack"),
)


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", KINDS)
def test_any_range_can_be_computed_alone(adapted: dict[str, Example], kind: str, data: st.DataObject) -> None:
    example = adapted[kind]
    place, itemsize = example.place, example.place.dtype.itemsize
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, place.elements)] * 2)))
    reader = SourceReader(Ledger())
    got = place.read(reader, start, stop, Purpose.EXPERT)
    reader.close()
    assert np.array_equal(got, example.whole[start * itemsize : stop * itemsize])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_may_be_written_to(adapted: dict[str, Example], kind: str) -> None:
    """A caller owns what it gets: writing to it changes nothing that is kept."""
    place, whole = adapted[kind].place, adapted[kind].whole
    reader = SourceReader(Ledger())
    place.read(reader, 0, place.elements, Purpose.EXPERT)[:] = 0
    assert np.array_equal(place.read(reader, 0, place.elements, Purpose.EXPERT), whole)
    reader.close()


SHAPES = st.lists(st.sampled_from([1, 2, 3, 16, 32, 64, 96]), min_size=1, max_size=3)
PARTS = st.sampled_from(
    [
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "weight", "bias"),
        *("lora_magnitude_vector", "base_layer.weight", "base_layer.lora_A.weight", "base_layer.lora_B.weight"),
        "token_adapter.trainable_tokens_delta",
    ]
)
MODULES = st.sampled_from(["model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", "model.norm", "other"])
SWITCHES = st.fixed_dictionaries(
    {},
    optional={
        "use_dora": st.booleans(),
        "fan_in_fan_out": st.booleans(),
        "trainable_token_indices": st.just([0, 5]),
        "target_parameters": st.just(["q_proj.weight"]),
        "modules_to_save": st.just(["lm_head", "embed_tokens"]),
        "r": st.sampled_from([1, 2, 3]),
    },
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tied=request.param)(tmp_path_factory.mktemp("model"), torch.bfloat16)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_an_adapter_holds_it_is_computed_or_refused_in_a_sentence(
    model: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """What has been accepted can be read: no mistake of an adapter is found by who reads a mount."""
    tensors = {}
    for module in data.draw(st.sets(MODULES, min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            tensors |= {f"{module}.lora_A.weight": torch.ones(2, 32)}
            tensors |= {f"{module}.lora_B.weight": torch.ones(data.draw(st.sampled_from([32, 96])), 2)}
        for part, shape in data.draw(st.dictionaries(PARTS, SHAPES, max_size=3)).items():
            tensors[f"{module}.{part}"] = torch.ones(shape)
    adapter = write_adapter(tmp_path, tensors, **data.draw(SWITCHES))
    try:
        places = applied(Pair(model, adapter))
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        assert "\n" not in str(error)
    else:
        assert read_all(places).keys() >= set(load_model(model))


# Rows of a merged vocabulary


def test_rows_are_gathered_from_computed_embeddings_as_from_stored_ones(adapted: dict[str, Example]) -> None:
    example = adapted["an embedding of several blocks"]
    rows = np.array([19999, 0, 3, 4, 5, 8191, 8192, 3], dtype=np.int64)
    table = RowTable(np.zeros(rows.size, dtype=np.int16), rows, np.empty((0, 1), dtype=np.int64))
    gathered = gather_rows([example.place], table, example.place.dtype)
    ledger = Ledger()
    reader = SourceReader(ledger)
    got = gathered.read(reader, 0, gathered.elements, Purpose.EXPERT)
    reader.close()
    assert np.array_equal(got.reshape(rows.size, -1), example.whole.reshape(20000, -1)[rows])
    assert ledger.totals().expert_bytes_read <= gathered.total_bytes_read(Role.EXPERT)
    assert not gathered.divisible


# Accounts


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_costs_what_it_says(adapted: dict[str, Example], kind: str) -> None:
    place = adapted[kind].place
    grid = BlockGrid.of(place.shape)
    ledger = Ledger()
    reader = SourceReader(ledger)
    for start, stop in grid:
        place.read(reader, start, stop, Purpose.EXPERT)
    reader.close()
    totals = ledger.totals()
    assert totals.expert_bytes_read == place.total_bytes_read(Role.EXPERT) == place.bytes_read(grid, Role.EXPERT).sum()
    assert totals.base_bytes_read == place.total_bytes_read(Role.BASE) == place.bytes_read(grid, Role.BASE).sum()
    assert totals.expert_bytes_reread == 0
    assert place.divisible is (kind == "a saved tensor")


def test_factors_are_read_once_however_many_threads_want_them(adapted: dict[str, Example]) -> None:
    example = adapted["an embedding of several blocks"]
    ledger = Ledger()
    reader = SourceReader(ledger)
    grid = BlockGrid.of(example.place.shape)
    with ThreadPoolExecutor(8) as pool:
        bounds = [bound for _ in range(4) for bound in grid]
        pieces = list(pool.map(lambda b: example.place.read(reader, *b, Purpose.EXPERT), bounds))
    reader.close()
    assert np.array_equal(np.concatenate(pieces[: grid.count]), example.whole)
    weight, *factors = (part.total_bytes_read(Role.EXPERT) for part in example.place.parts)
    assert ledger.totals().expert_bytes_read == 4 * weight + sum(factors)


def test_factors_that_had_to_make_room_count_as_read_again(
    adapted: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergefs.sources.reader._KEPT_BYTES", 0)
    place = adapted["a projection"].place
    ledger = Ledger()
    reader = SourceReader(ledger)
    for _ in range(2):
        read(place, reader)
    read(place, reader, Purpose.ANALYSIS)
    reader.close()
    totals = ledger.totals()
    cost = place.total_bytes_read(Role.EXPERT)
    assert (totals.expert_bytes_read, totals.expert_bytes_reread) == (cost, cost)
    assert totals.analysis_bytes_read == cost + place.nbytes


def test_a_tensor_says_which_kernels_it_needs(adapted: dict[str, Example]) -> None:
    needed = {kind: set(example.place.kernels()) for kind, example in adapted.items()}
    assert needed["a projection"] == {("low_rank", BF16)}
    assert needed["a Conv1D"] == {("low_rank", F16)}
    assert needed["DoRA"] == {("low_rank", F32)}  # its rows are measured before they are rounded
    assert needed["a bias"] == needed["replaced rows"] == set()


def test_formulas_tell_adapters_apart(tmp_path: Path) -> None:
    base = llama()(tmp_path / "base", torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    formulas = {
        applied(train(base, tmp_path / str(number), target_modules=["q_proj"], **config))[name].formula
        for number, config in enumerate(
            ({"r": 4}, {"r": 4, "lora_alpha": 5}, {"r": 2}, {"r": 4, "use_rslora": True}, {"r": 4, "lora_alpha": 8.0})
        )
    }
    assert len(formulas) == 4  # the last is the first, written otherwise
