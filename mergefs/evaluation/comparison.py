"""Several models on one text, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergefs.errors import EvaluationError
from mergefs.evaluation.loading import LoadedModel
from mergefs.evaluation.measures import Divergence, complete, divergence, perplexity
from mergefs.evaluation.text import cut_into_windows
from mergefs.progress import Progress

Load = Callable[[], LoadedModel]
"""Loads one model; it is called when the model is needed, and again where memory is to be spared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run: ``context`` tokens at a time, at most ``tokens`` of the text, ``batch`` windows at once.

    Prompts are completed by ``new_tokens`` tokens.
    """

    context: int
    tokens: int
    batch: int
    prompts: tuple[str, ...] = ()
    new_tokens: int = 40


@dataclass(frozen=True, slots=True)
class Measured:
    """What one model says of the text.

    ``perplexity`` is that of a token; ``divergence`` is from the first model, None for that itself and for a model with
    another vocabulary. ``completions`` belong to the prompts.
    """

    title: str
    plan_id: str | None
    expert_bytes_read: int | None
    predicted_relative_error: float | None
    tokens: int
    perplexity: float
    divergence: Divergence | None
    completions: tuple[str, ...]


def compare(loads: Sequence[Load], text: str, settings: Settings, progress: Progress) -> list[Measured]:
    """Return what each model says of ``text``; at most two models are in memory at a time."""
    first = loads[0]()
    results = [_measure(first, None, text, settings, progress)]
    for load in loads[1:]:
        results.append(_measure(load(), first, text, settings, progress))
    return results


def measure(loaded: LoadedModel, text: str, settings: Settings, progress: Progress) -> Measured:
    """Return what one model says of ``text``."""
    return _measure(loaded, None, text, settings, progress)


def _measure(
    loaded: LoadedModel, first: LoadedModel | None, text: str, settings: Settings, progress: Progress
) -> Measured:
    windows = cut_into_windows(text, loaded.tokenizer, _context(loaded, settings.context), settings.tokens)
    comparable = first is not None and first.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    progress.start(f"running {loaded.title}", len(windows.tokens) * (2 if comparable else 1))
    found = perplexity(loaded.model, windows, settings.batch, progress.advance)
    apart = None
    if first is not None and comparable:
        apart = divergence(first.model, loaded.model, windows, settings.batch, progress.advance)
    progress.finish()
    return Measured(
        title=loaded.title,
        plan_id=loaded.plan_id,
        expert_bytes_read=loaded.expert_bytes_read,
        predicted_relative_error=loaded.predicted_relative_error,
        tokens=windows.predicted,
        perplexity=found,
        divergence=apart,
        completions=tuple(
            complete(loaded.model, loaded.tokenizer, prompt, settings.new_tokens) for prompt in settings.prompts
        ),
    )


def _context(loaded: LoadedModel, wanted: int) -> int:
    """Return the context, which must be one that the model has positions for."""
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and wanted > longest:
        raise EvaluationError(
            f"{loaded.title} has {longest} positions and --context is {wanted}; give at most {longest}"
        )
    return wanted
