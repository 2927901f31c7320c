"""Tensors that have a row for each token: which they are, and how those of several models are made to fit together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mergefs.checkpoint.dtypes import DType
from mergefs.recipe.references import ModelReference
from mergefs.sources.place import Place

if TYPE_CHECKING:
    from mergefs.sources.gathered import RowMeans
    from mergefs.tokenizer.vocabulary import MergedVocabulary

# The input and output embeddings of every architecture that mergekit knows, and the biases of the latter.
_TOKEN_ROWS: Final = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|lm_head(\.linear|\.decoder)?|embed_out"
    r"|cls\.predictions(\.decoder)?|vocab_projector|transformer\.output_layer)\.(weight|bias)$"
    r"|^((model\.)?shared|output|backbone\.embeddings)\.(weight|bias)$"
)


def has_row_for_each_token(name: str) -> bool:
    """Return whether the tensor ``name`` is an embedding of tokens, or a bias with a number for each of them."""
    return _TOKEN_ROWS.search(name) is not None


@dataclass(frozen=True, slots=True)
class Alignment:
    """Makes the rows of several models fit together.

    By a merged ``vocabulary``; without one, where ``truncate`` allows it, by leaving out rows that not all have.
    ``stand_in`` is the model that stands in for a base, where there is one. ``heights`` gathers what tensors were cut
    to.
    """

    vocabulary: "MergedVocabulary | None"
    truncate: bool
    means: "RowMeans"
    stand_in: ModelReference | None
    heights: dict[str, int] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int | None:
        """The number of rows of the merged embeddings, where that is not simply the number that all models have."""
        if self.vocabulary is not None:
            return self.vocabulary.size
        return min(self.heights.values(), default=None)

    def align(
        self,
        name: str,
        models: Sequence[ModelReference],
        places: Sequence[Place],
        base: ModelReference | None,
        compute: DType,
    ) -> tuple[Place, ...]:
        """Return where tensor ``name`` of each of ``models``, at ``places``, is once it fits the others.

        ``compute`` is the type that it is merged in. Raises the errors of ``MergedVocabulary.gather``.
        """
        if not has_row_for_each_token(name) or not all(place.dtype.is_float and place.shape for place in places):
            return tuple(places)
        if self.vocabulary is not None:
            return self.vocabulary.gather(models, places, base, compute, self.means)
        heights = {place.shape[0] for place in places}
        if not self.truncate or len(heights) == 1:
            return tuple(places)
        from mergefs.sources.gathered import FirstRows

        lowest = self.heights[name] = min(heights)
        return tuple(place if place.shape[0] == lowest else FirstRows(place, lowest) for place in places)

    def align_stand_in(self, name: str, place: Place, like: Place, compute: DType) -> Place:
        """Return where tensor ``name`` of the stand-in, at ``place``, is once it fits ``like``, an aligned tensor."""
        if not has_row_for_each_token(name) or not place.dtype.is_float or place.shape[1:] != like.shape[1:]:
            return place
        if self.vocabulary is not None and self.stand_in is not None:
            return self.vocabulary.stand_in(self.stand_in, place, like, compute)
        if self.truncate and place.shape[0] > like.shape[0]:
            from mergefs.sources.gathered import FirstRows

            return FirstRows(place, like.shape[0])
        return place
