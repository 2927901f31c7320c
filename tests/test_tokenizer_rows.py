"""Gathered rows are mergekit's, any range of them can be read alone, and they cost what was planned."""

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import mergekit._data.architectures
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mergekit.common import ImmutableMap
from mergekit.common import ModelReference as TheirReference
from mergekit.tokenizer.config import TokenEmbeddingConfig
from mergekit.tokenizer.embed import PermutedVocabulary
from safetensors.torch import save_file
from tensors import bits
from tokenizers_oracle import exact_padding

from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.checkpoint.dtypes import F64, promote
from mergefs.errors import PlanError, RecipeError
from mergefs.kernels.precision import Raw, store
from mergefs.planner.vocabulary import has_row_for_each_token
from mergefs.recipe import document
from mergefs.recipe.references import ModelReference
from mergefs.recipe.tokenizer import ModelSource, OtherTokenSource, TokenSetting, TokenSource, ZeroSource
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.gathered import FirstRows, GatheredComputedRows, GatheredRows
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.row_means import mean_row
from mergefs.tokenizer.vocabulary import MergedVocabulary, NamedToken

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAME = "model.embed_tokens.weight"

# A busy machine must not fail a test.
UNTIMED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """Tensors of several models, and where each token of a merged vocabulary lies in them."""

    tensors: tuple[torch.Tensor, ...]
    rows: tuple[tuple[int, ...], ...]
    base: int | None = None
    tokens: tuple[tuple[int, TokenSource, bool], ...] = ()
    padding: int = 0

    @property
    def size(self) -> int:
        return len(self.rows[0])

    @property
    def references(self) -> tuple[ModelReference, ...]:
        return tuple(reference(index) for index in range(len(self.tensors)))


def reference(index: int) -> ModelReference:
    return ModelReference(f"model-{index}", f"model-{index}", None, None)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random numbers, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    zeros = torch.copysign(torch.zeros_like(tensor), tensor)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, zeros, tensor).to(dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 4))
    rest = draw(st.sampled_from([(), (1,), (3,), (8,), (2, 3)]))
    heights = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    size = draw(st.integers(1, 12))
    rows = tuple(tuple(draw(st.lists(st.integers(-1, height - 1), min_size=size, max_size=size))) for height in heights)
    tensors = tuple(
        values((height, *rest), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))) for height in heights
    )
    tokens = []
    for number in draw(st.lists(st.integers(0, size - 1), unique=True, max_size=3)):
        model = draw(st.integers(0, count - 1))
        source = draw(
            st.sampled_from(
                [
                    ZeroSource(),
                    OtherTokenSource(reference(model), None, draw(st.integers(0, heights[model] - 1))),
                    *([ModelSource(reference(model))] if rows[model][number] >= 0 else []),
                ]
            )
        )
        tokens.append((number, source, draw(st.booleans())))
    base = draw(st.none() | st.integers(0, count - 1))
    return Case(tensors, rows, base, tuple(tokens), draw(st.integers(0, 3)))


# What mergekit makes of it


def their_source(source: TokenSource) -> Any:
    if isinstance(source, ZeroSource):
        return {"kind": "zero"}
    if isinstance(source, ModelSource):
        return source.model.text
    return {"kind": "model_token", "model": source.model.text, "token_id": source.token_id}


def by_mergekit(case: Case) -> list[torch.Tensor]:
    models = [TheirReference.model_validate(entry.text) for entry in case.references]
    vocabulary = {f"token {number}": number for number in range(case.size)}
    configured = {
        f"token {number}": TokenEmbeddingConfig.model_validate({"source": their_source(source), "force": force})
        for number, source, force in case.tokens
    }
    task = PermutedVocabulary.model_construct(
        tokens=ImmutableMap(data=configured),
        pad_to_multiple_of=case.size + case.padding,
        base_model=None if case.base is None else models[case.base],
        vocabulary_axis=0,
    )
    info: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary),
        permutations={model: dict(enumerate(rows)) for model, rows in zip(models, case.rows, strict=True)},
        original_vocabs={},
    )
    with exact_padding():
        merged = task.execute(tokenizer_info=info, tensors=dict(zip(models, case.tensors, strict=True)))
    return [merged[model] for model in models]


# What we make of it


class Means:
    """Gathers means whenever they are asked for."""

    def __init__(self, reader: SourceReader) -> None:
        self._reader = reader

    def mean_row(self, rows: Place) -> Raw:
        return store(mean_row(rows, self._reader), F64, rows.dtype)


@dataclass(frozen=True)
class Gathered:
    """The places of a case, and what reads them."""

    places: tuple[Place, ...]
    reader: SourceReader
    ledger: Ledger

    def tensor(self, index: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements of one place."""
        place = self.places[index]
        raw = place.read(self.reader, start, place.elements if stop is None else stop, Purpose.EXPERT)
        dtype = getattr(torch, place.dtype.torch_name)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)


def vocabulary(case: Case) -> MergedVocabulary:
    size = case.size + case.padding
    where = document.Place("<recipe>", 1)
    return MergedVocabulary(
        used=np.arange(size) < case.size,
        permutations=MappingProxyType(
            {
                entry: np.array([*rows, *[-1] * case.padding], dtype=np.int64)
                for entry, rows in zip(case.references, case.rows, strict=True)
            }
        ),
        tokens=tuple(
            NamedToken(TokenSetting(f"token {number}", source, force, where), number, None)
            for number, source, force in case.tokens
        ),
        files={},
        notes=(),
    )


@contextmanager
def stored(tensors: Sequence[torch.Tensor], base: int | None) -> Iterator[tuple[list[Place], SourceReader, Ledger]]:
    """Lend the tensors in files of their own; that of the base is the base's."""
    ledger = Ledger()
    reader = SourceReader(ledger)
    with tempfile.TemporaryDirectory() as name:
        places: list[Place] = []
        for index, tensor in enumerate(tensors):
            directory = Path(name) / str(index)
            directory.mkdir()
            (directory / "config.json").write_text("{}")
            save_file({NAME: tensor}, directory / "model.safetensors")
            role = Role.BASE if index == base else Role.EXPERT
            places.append(StoredTensor.of(open_checkpoint(directory), NAME, role))
        yield places, reader, ledger
        reader.close()


@contextmanager
def gathered(case: Case) -> Iterator[Gathered]:
    with stored(case.tensors, case.base) as (places, reader, ledger):
        compute = places[0].dtype
        for place in places[1:]:
            compute = promote(compute, place.dtype)
        base = None if case.base is None else reference(case.base)
        found = vocabulary(case).gather(case.references, places, base, compute, Means(reader))
        yield Gathered(found, reader, ledger)


def like(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """Return a tensor of mergekit's in the type of ``place``, which keeps its own where nothing is gathered."""
    return tensor.to(getattr(torch, place.dtype.torch_name))


IDENTITY = Case((values((4, 3), torch.float32, 1),), ((0, 1, 2, 3),))
MEANS = Case(
    tuple(values((5, 8), dtype, seed) for seed, dtype in enumerate(DTYPES[:3])),
    ((0, 1, 2, 3, 4, -1), (-1, 0, -1, 1, 2, -1), (4, 3, 2, 1, 0, -1)),
    padding=2,
)


@UNTIMED
@given(cases())
@example(IDENTITY)
@example(MEANS)
@example(replace(MEANS, base=1))
def test_rows_are_those_of_mergekit(case: Case) -> None:
    theirs = by_mergekit(case)
    with gathered(case) as ours:
        for index, place in enumerate(ours.places):
            assert place.shape == tuple(theirs[index].shape)
            assert torch.equal(bits(ours.tensor(index)), bits(like(theirs[index], place)).flatten())


@UNTIMED
@given(cases(), st.data())
def test_any_range_of_elements_can_be_read_alone(case: Case, data: st.DataObject) -> None:
    with gathered(case) as ours:
        for index, place in enumerate(ours.places):
            whole = ours.tensor(index)
            start = data.draw(st.integers(0, place.elements))
            stop = data.draw(st.integers(start, place.elements))
            assert torch.equal(bits(ours.tensor(index, start, stop)), bits(whole[start:stop]))


@UNTIMED
@given(cases(), st.integers(1, 40))
@example(MEANS, 24)
def test_a_block_costs_what_was_planned(case: Case, step: int) -> None:
    with gathered(case) as ours:
        for index, place in enumerate(ours.places):
            grid = BlockGrid(place.elements, step)
            planned = {role: place.bytes_read(grid, role).tolist() for role in Role}
            for block, (start, stop) in enumerate(grid):
                before = ours.ledger.totals()
                ours.tensor(index, start, stop)
                after = ours.ledger.totals()
                assert after.expert_bytes_read - before.expert_bytes_read == planned[Role.EXPERT][block]
                assert after.base_bytes_read - before.base_bytes_read == planned[Role.BASE][block]


def formula(case: Case) -> bytes:
    with gathered(case) as ours:
        return ours.places[0].formula


def test_the_formula_tells_the_rows_and_the_type() -> None:
    """Together with the contents of its parts it identifies the content: statistics are kept under both."""
    case = Case(tuple(values((3, 2), torch.bfloat16, seed) for seed in range(2)), ((2, -1), (0, 1)))
    other_row = replace(case, rows=((1, -1), (0, 1)))
    other_type = replace(case, tensors=(case.tensors[0], case.tensors[1].float()))
    averaged = Case((*case.tensors, case.tensors[0]), (*case.rows, (0, 1)))
    assert formula(case) == formula(replace(case))
    assert len({formula(entry) for entry in (case, other_row, other_type, averaged)}) == 4


def test_a_model_that_has_the_merged_vocabulary_is_read_as_it_is() -> None:
    with gathered(IDENTITY) as ours:
        assert isinstance(ours.places[0], StoredTensor)


def test_models_that_give_no_rows_are_no_parts() -> None:
    case = Case(
        tuple(values((3, 2), torch.float32, seed) for seed in range(3)), ((0, 1, -1), (-1, 0, 1), (0, 1, 2)), base=1
    )
    with gathered(case) as ours:
        first, second, third = ours.places
        assert len(first.parts) == 2  # its own, and the base's for the token that it lacks
        assert len(second.parts) == 3  # the base lacks a token, too, which gets the average of the others
        assert isinstance(third, StoredTensor)


def test_rows_that_lie_next_to_each_other_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((values((8, 4), torch.float32, 0),), ((3, 4, 5, 0, 1, 7),))
    with gathered(case) as ours:
        reads: list[int] = []
        before = SourceReader.read

        def read(self: SourceReader, source: Any, offset: int, size: int, purpose: Purpose) -> Raw:
            reads.append(size // 16)
            return before(self, source, offset, size, purpose)

        monkeypatch.setattr(SourceReader, "read", read)
        ours.tensor(0)
        assert reads == [2, 3, 1]


class Computed(Place):
    """A tensor that is computed from all of another one, whichever part of it is read."""

    def __init__(self, whole: Place) -> None:
        self._whole = whole

    shape = property(lambda self: self._whole.shape)
    dtype = property(lambda self: self._whole.dtype)
    parts = property(lambda self: (self._whole,))
    formula = b"computed"

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        return self._whole.read(reader, 0, self.elements, purpose)[start * 4 : stop * 4]

    def bytes_read(self, grid: BlockGrid, role: Role) -> Any:
        return np.full(grid.count, self._whole.total_bytes_read(role))

    def describe(self) -> str:
        return "computed"


def test_rows_of_computed_places_are_bought_whole_or_not_at_all() -> None:
    with stored([values((4, 2), torch.float32, 0)], None) as (places, reader, _):
        case = Case((torch.zeros(4, 2),), ((3, 2, 1, 0),))
        for nested, kind in ((FirstRows(places[0], 4), GatheredRows), (Computed(places[0]), GatheredComputedRows)):
            (place,) = vocabulary(case).gather(case.references, [nested], None, nested.dtype, Means(reader))
            assert type(place) is kind
            assert place.divisible == (kind is GatheredRows)
            assert place.total_bytes_read(Role.EXPERT) == 4 * 8


def test_first_rows_are_those_of_the_whole() -> None:
    tensor = values((6, 3), torch.bfloat16, 0)
    with stored([tensor], None) as (places, reader, ledger):
        cut = FirstRows(places[0], 4)
        raw = cut.read(reader, 0, cut.elements, Purpose.EXPERT)
        assert torch.equal(torch.from_numpy(raw).view(torch.bfloat16).reshape(4, 3), tensor[:4])
        assert cut.total_bytes_read(Role.EXPERT) == ledger.totals().expert_bytes_read == 4 * 3 * 2


def test_the_mean_of_many_rows_is_summed_in_float64() -> None:
    """More rows than one pass reads at once, of a mean that float32 sums would lose."""
    tensor = torch.full((300_000, 2), 0.1, dtype=torch.float32)
    with stored([tensor], None) as (places, reader, _):
        found = mean_row(places[0], reader)
    assert found.tolist() == [math.fsum(tensor[:, 0].tolist()) / 300_000] * 2


# What does not fit together


def refused(case: Case, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught, gathered(case):
        pass
    return re.sub(r"/\S+/(?=\d/model)", "", str(caught.value))


TWO = tuple(values((3, 2), torch.float32, seed) for seed in range(2))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            OtherTokenSource(reference(1), None, 3),
            "<recipe>:1: token 'token 0' is to get the embedding of token_id 3 of 'model-1', whose ids end at 2; "
            "correct it",
        ),
        (
            OtherTokenSource(reference(1), "unknown", None),
            "<recipe>:1: token 'token 0' is to get the embedding of token 'unknown' of 'model-1', which does not have "
            "that token; name another source",
        ),
        (
            ModelSource(reference(1)),
            "<recipe>:1: token 'token 0' is to get the embedding of token 'token 0' of 'model-1', which does not have "
            "that token; name another source",
        ),
        (
            ModelSource(reference(7)),
            "<recipe>:1: token 'token 0' gets its embedding from model 'model-7', which takes no part in the slice "
            "that the embeddings are merged in; name one that does",
        ),
        (
            None,
            "<recipe>:1: token 'token 0' is not in the tokenizer of 'model-1', and no 'source' says which embedding it "
            "gets there; add one",
        ),
    ],
)
def test_a_source_without_the_row_is_refused(source: Any, sentence: str) -> None:
    assert refused(Case(TWO, ((0,), (-1,)), tokens=((0, source, False),)), RecipeError) == sentence


def test_a_source_that_is_not_needed_is_not_looked_at() -> None:
    case = Case(TWO, ((0,), (1,)), tokens=((0, OtherTokenSource(reference(1), None, 99), False),))
    with gathered(case) as ours:
        assert ours.places[0].shape == (1, 2)


def test_a_tensor_that_lacks_rows_of_tokens_is_refused() -> None:
    assert refused(Case(TWO, ((0, 3), (0, 1))), PlanError) == (
        "model-0: its embeddings have 3 rows, but its tokenizer and config.json a token with id 3; correct "
        "'vocab_size' in its config.json"
    )


def test_rows_of_different_shapes_are_refused() -> None:
    case = Case((torch.zeros(3, 2), torch.zeros(3, 4)), ((0,), (0,)))
    assert refused(case, PlanError) == (
        "1/model.safetensors: tensor 'model.embed_tokens.weight' is [3, 4] and 0/model.safetensors: tensor "
        "'model.embed_tokens.weight' is [3, 2], which may differ in the number of rows only; merge models of one "
        "architecture"
    )


# Which tensors have a row for each token


def weights_of_architectures() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every weight of every architecture that mergekit describes, with the name of the description."""

    def walk(item: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(item, dict):
            if isinstance(item.get("name"), str):
                yield item
            for inner in item.values():
                yield from walk(inner)
        elif isinstance(item, list):
            for inner in item:
                yield from walk(inner)

    for path in sorted(Path(mergekit._data.architectures.__path__[0]).glob("*.json")):
        for weight in walk(json.loads(path.read_text())):
            yield path.stem, weight


def test_the_tensors_with_a_row_for_each_token_are_those_of_mergekit() -> None:
    found = 0
    for architecture, weight in weights_of_architectures():
        if architecture == "phi-1":
            continue  # numbers its output embedding as if it were a layer
        for name in (weight["name"], *(weight.get("aliases") or [])):
            indexed = weight.get("vocabulary_axis") is not None
            assert has_row_for_each_token(name.replace("${layer_index}", "3")) == indexed, (architecture, name)
            assert weight.get("vocabulary_axis") in (None, 0)
            found += indexed
    assert found > 80


@pytest.mark.parametrize(
    "name",
    [
        *("lm_head.dense.weight", "lm_head.layer_norm.bias", "cls.predictions.transform.dense.weight"),
        *("model.layers.0.attention.output.weight", "model.embed_positions.weight", "word_embeddings_layernorm.weight"),
        *("model.layers.0.mlp.shared.weight", "vision_tower.embeddings.position_embedding.weight"),
    ],
)
def test_other_tensors_have_none(name: str) -> None:
    assert not has_row_for_each_token(name)
