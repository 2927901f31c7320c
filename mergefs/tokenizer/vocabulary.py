"""The merged vocabulary: which row of which model each of its tokens gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.errors import PlanError
from mergefs.recipe.references import ModelReference
from mergefs.recipe.tokenizer import ModelSource, OtherTokenSource, TokenSetting, ZeroSource
from mergefs.recipe.wording import quote
from mergefs.sources.gathered import AVERAGE, ZERO, RowMeans, RowTable, gather_padded_rows, gather_rows
from mergefs.sources.place import Place


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token that the recipe names: its id in the merged vocabulary.

    ``found`` is the id of the token whose embedding it is to get, where that is named by its text; -1 when the model
    does not have it.
    """

    setting: TokenSetting
    number: int
    found: int | None


@dataclass(frozen=True, slots=True, eq=False)
class MergedVocabulary:
    """The vocabulary of a merged model.

    ``used`` says for each id, padding included, whether a token has it. ``permutations`` give for each model the row
    (int64) that the token of each id has there, -1 where there is none. ``files`` are those of the tokenizer.
    """

    used: NDArray[np.bool_]
    permutations: Mapping[ModelReference, NDArray[np.int64]]
    tokens: tuple[NamedToken, ...]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of rows of the merged embeddings."""
        return int(self.used.size)

    def gather(
        self,
        models: Sequence[ModelReference],
        places: Sequence[Place],
        base: ModelReference | None,
        compute: DType,
        means: RowMeans,
    ) -> tuple[Place, ...]:
        """Return a tensor with a row for each token as the merged vocabulary has it, of each of ``models``.

        ``places`` are where the tensor lies in them, ``compute`` is the type that they are merged in. Ids that no
        token has get the mean of the rows of all tokens. Raises RecipeError for a token whose source has no such row,
        PlanError for tensors that do not fit together.
        """
        for place in places:
            if not place.shape or place.shape[1:] != places[0].shape[1:]:
                raise PlanError(
                    f"{place.describe()} is {list(place.shape)} and {places[0].describe()} is {list(places[0].shape)}, "
                    "which may differ in the number of rows only; merge models of one architecture"
                )
        tables = self.row_tables(models, [place.shape[0] for place in places], base)
        if bool(self.used.all()):
            return tuple(gather_rows(places, table, compute) for table in tables)
        return tuple(gather_padded_rows(places, table, self.used, compute, means) for table in tables)

    def stand_in(self, model: ModelReference, place: Place, like: Place, compute: DType) -> Place:
        """Return a tensor of ``model``, at ``place``, with a row for each token.

        It may take no part in the merge. Of tokens that it lacks it has the rows of ``like``, a tensor with a row for
        each token. Raises PlanError when ``place`` is too small.
        """
        own = self.permutations[model]
        _check_heights(own[np.newaxis], [model], [place.shape[0]])
        has = own >= 0
        table = RowTable(
            part=np.where(has, np.int16(0), np.int16(1)),
            row=np.where(has, own, np.arange(self.size)),
            averages=np.empty((0, 2), dtype=np.int64),
        )
        return gather_rows([place, like], table, compute)

    def row_tables(
        self, models: Sequence[ModelReference], heights: Sequence[int], base: ModelReference | None
    ) -> tuple[RowTable, ...]:
        """Return for each of ``models`` where the rows of a tensor come from that has ``heights`` rows in them.

        A model keeps the rows of its own tokens. A token that it lacks gets the row of the base where the base has
        it, else the mean of the models that have it, or zero where none has; or what the recipe says. Rows of ids
        that no token has are zero here.

        Raises RecipeError for a token whose source has no such row, PlanError when a tensor is too small.
        """
        rows = np.stack([self.permutations[model] for model in models])
        _check_heights(rows, models, heights)
        default = self._default_rows(rows, models, base)
        forced = np.zeros(self.size, dtype=np.bool_)
        for token in self.tokens:
            self._apply(token, default, forced, rows, models, heights)
        tables = []
        for index, own in enumerate(rows):
            kept = (own >= 0) & ~forced
            part = np.where(kept, np.int16(index), default.part)
            averaged = np.flatnonzero(part == AVERAGE)
            row = np.where(kept, own, default.row)
            row[averaged] = np.arange(averaged.size)
            tables.append(RowTable(part, row, np.ascontiguousarray(rows.T[averaged])))
        return tuple(tables)

    def digest(self) -> str:
        """Return a hash of everything here that the merged model depends on."""
        hasher = blake3(self.used.tobytes())
        for permutation in self.permutations.values():
            hasher.update(permutation.tobytes())
        for token in self.tokens:
            setting = token.setting
            hasher.update(f"{setting.token!r} {setting.source!r} {setting.force} {token.number} {token.found}".encode())
        for name in sorted(self.files):
            hasher.update(f"{len(self.files[name])} {name!r}".encode())
            hasher.update(self.files[name])
        return hasher.hexdigest(length=16)

    def _default_rows(
        self, rows: NDArray[np.int64], models: Sequence[ModelReference], base: ModelReference | None
    ) -> RowTable:
        """Return the rows of the tokens that a model lacks and that the recipe says nothing about."""
        has = rows >= 0
        present = has.sum(axis=0)
        part = np.full(self.size, ZERO, dtype=np.int16)
        part[present > 1] = AVERAGE
        single = present == 1
        part[single] = has.argmax(axis=0)[single]
        if base in models:
            index = models.index(base)
            part[has[index] & (present > 1)] = index
        row = np.where(part >= 0, rows[np.maximum(part, 0), np.arange(self.size)], 0)
        return RowTable(part, row, np.empty((0, len(models)), dtype=np.int64))

    def _apply(
        self,
        token: NamedToken,
        default: RowTable,
        forced: NDArray[np.bool_],
        rows: NDArray[np.int64],
        models: Sequence[ModelReference],
        heights: Sequence[int],
    ) -> None:
        """Write what the recipe says about one token into ``default`` and ``forced``."""
        setting, number = token.setting, token.number
        if not setting.force and bool((rows[:, number] >= 0).all()):
            return
        source = setting.source
        if source is None:
            missing = models[int((rows[:, number] < 0).argmax())]
            raise setting.place.error(
                f"token {quote(setting.token)} is not in the tokenizer of {quote(missing.text)}, and no 'source' says "
                "which embedding it gets there; add one"
            )
        forced[number] = setting.force
        if isinstance(source, ZeroSource):
            default.part[number] = ZERO
            return
        if source.model not in models:
            raise setting.place.error(
                f"token {quote(setting.token)} gets its embedding from model {quote(source.model.text)}, which takes "
                "no part in the slice that the embeddings are merged in; name one that does"
            )
        index = models.index(source.model)
        default.part[number] = index
        default.row[number] = _source_row(token, source, int(rows[index, number]), heights[index])


def _source_row(token: NamedToken, source: ModelSource | OtherTokenSource, own: int, height: int) -> int:
    """Return the row of ``source`` in its model, where the token itself has the row ``own`` of ``height``."""
    setting = token.setting
    if isinstance(source, ModelSource):
        wanted, row = setting.token, own
    elif source.token is not None:
        wanted, row = source.token, -1 if token.found is None else token.found
    else:
        wanted, row = "", -1 if source.token_id is None else source.token_id
    if not wanted and not 0 <= row < height:
        raise setting.place.error(
            f"token {quote(setting.token)} is to get the embedding of token_id {row} of {quote(source.model.text)}, "
            f"whose ids end at {height - 1}; correct it"
        )
    if not 0 <= row < height:
        raise setting.place.error(
            f"token {quote(setting.token)} is to get the embedding of token {quote(wanted)} of "
            f"{quote(source.model.text)}, which does not have that token; name another source"
        )
    return row


def _check_heights(rows: NDArray[np.int64], models: Sequence[ModelReference], heights: Sequence[int]) -> None:
    """Refuse tensors that lack rows of tokens."""
    for own, model, height in zip(rows, models, heights, strict=True):
        highest = int(own.max(initial=-1))
        if highest >= height:
            raise PlanError(
                f"{model.text}: its embeddings have {height} rows, but its tokenizer and config.json a token with id "
                f"{highest}; correct 'vocab_size' in its config.json"
            )
