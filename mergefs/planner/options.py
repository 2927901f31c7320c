"""What a plan depends on beside the recipe."""

from dataclasses import asdict, dataclass
from typing import Final

DEFAULT_SHARD_SIZE: Final = 5 * 10**9


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan depends on beside the recipe.

    ``budget`` is as in ``parse_budget``, None for none. ``base`` names a model that stands in for what the budget does
    not buy, for recipes without a base. ``truncate_embeddings`` merges vocabularies of different sizes without a
    merged tokenizer by their first rows, which is sound only where the same ids mean the same tokens.
    ``copy_tokenizer`` takes over the donor's tokenizer files, ``write_model_card`` adds a model card and the recipe.
    """

    budget: str | None = None
    base: str | None = None
    random_seed: int = 0
    max_shard_size: int = DEFAULT_SHARD_SIZE
    truncate_embeddings: bool = False
    copy_tokenizer: bool = True
    write_model_card: bool = True

    def recorded(self) -> dict[str, int | bool]:
        """Return what identifies a plan and is told by the model, by name.

        That is everything but budget and base, which are told by the bytes that are bought and by what stands in.
        """
        return {name: value for name, value in asdict(self).items() if name not in ("budget", "base")}
