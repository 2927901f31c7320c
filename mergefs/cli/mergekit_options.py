"""Every option of mergekit's own commands, and what it means here: the one place that says so.

The commands take their options from this table, and docs/from-mergekit.md is made from it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal


class Effect(Enum):
    """What an option of mergekit does here."""

    WORKS = "works"
    NOTHING = "changes nothing"
    REFUSED = "refused"


class Tool(Enum):
    """The command of mergekit that has an option."""

    YAML = "mergekit-yaml"
    MULTI = "mergekit-multi"


@dataclass(frozen=True, slots=True)
class MergekitOption:
    """One option: how it is spelt, what it takes, what it does here, and why, as the end of a sentence.

    ``name`` is what mergekit calls it inside. ``passed_over`` are values that ask for what is done anyway, so that
    nothing has to be said of them.
    """

    name: str
    spellings: tuple[str, ...]
    takes: Literal["switch", "flag", "count", "text", "number"]
    effect: Effect
    explanation: str
    passed_over: tuple[object, ...] = ()
    tool: Tool = Tool.YAML

    def spelling(self, value: object = True) -> str:
        """Return how the option is written, for a switch the side that means ``value``."""
        longest = max(self.spellings, key=len)
        on, _, off = longest.partition("/")
        return off if value is False and off else on


_NO_GPU: Final = (
    "everything is computed on the CPU, so that every machine gives the same bytes and a mount needs no GPU; leave the "
    "option out"
)

MERGEKIT_OPTIONS: Final[tuple[MergekitOption, ...]] = (
    MergekitOption(
        "allow_crimes",
        ("--allow-crimes/--no-allow-crimes",),
        "switch",
        Effect.NOTHING,
        "models of any architectures are merged as long as the names and the shapes of their tensors agree",
        passed_over=(False,),
    ),
    MergekitOption(
        "unsafe_truncate_embeddings",
        ("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",),
        "switch",
        Effect.WORKS,
        "embeddings of different heights are merged by the rows that all have, which is sound only where the same ids "
        "mean the same tokens; `tokenizer: {source: union}` in the recipe gives each token its own row",
    ),
    MergekitOption(
        "transformers_cache",
        ("--transformers-cache",),
        "text",
        Effect.WORKS,
        "models of the Hub are looked for in that directory, and downloaded to it, as HF_HUB_CACHE does it",
    ),
    MergekitOption(
        "lora_merge_cache",
        ("--lora-merge-cache",),
        "text",
        Effect.NOTHING,
        "an adapter is applied while its tensors are read, so there are no merged models to keep",
    ),
    MergekitOption(
        "lora_merge_dtype",
        ("--lora-merge-dtype",),
        "text",
        Effect.REFUSED,
        "an adapter is applied in the type of the weights that it changes; set `dtype` in the recipe for the type that "
        "the merge computes in",
    ),
    MergekitOption("cuda", ("--cuda/--no-cuda",), "switch", Effect.REFUSED, _NO_GPU, passed_over=(False,)),
    MergekitOption("device", ("--device",), "text", Effect.REFUSED, _NO_GPU, passed_over=("cpu", "auto")),
    MergekitOption(
        "low_cpu_memory",
        ("--low-cpu-memory/--no-low-cpu-memory",),
        "switch",
        Effect.NOTHING,
        "memory never holds more than the blocks that are being computed",
        passed_over=(False,),
    ),
    MergekitOption(
        "out_shard_size",
        ("--out-shard-size",),
        "text",
        Effect.WORKS,
        "like `--max-shard-size`; mergekit's help speaks of parameters, but it counts bytes: 5B are 5 GB, 500M are "
        "500 MB; 1.5B and sizes with a unit (10GiB) work too",
    ),
    MergekitOption(
        "copy_tokenizer",
        ("--copy-tokenizer/--no-copy-tokenizer",),
        "switch",
        Effect.WORKS,
        "with `--no-copy-tokenizer` the tokenizer files of the base (or the first model) are left out; a tokenizer "
        "that the recipe asks for is written all the same",
    ),
    MergekitOption(
        "clone_tensors",
        ("--clone-tensors/--no-clone-tensors",),
        "switch",
        Effect.NOTHING,
        "a tensor that occurs several times is written each time anyway",
        passed_over=(False,),
    ),
    MergekitOption(
        "trust_remote_code",
        ("--trust-remote-code/--no-trust-remote-code",),
        "switch",
        Effect.NOTHING,
        "code files of a model come along as data and are never run",
        passed_over=(False,),
    ),
    MergekitOption(
        "random_seed",
        ("--random-seed",),
        "number",
        Effect.WORKS,
        "the seed of methods that drop at random; it is 0 when left out, so that the same recipe always gives the same "
        "model",
    ),
    MergekitOption(
        "lazy_unpickle",
        ("--lazy-unpickle/--no-lazy-unpickle",),
        "switch",
        Effect.NOTHING,
        "weights are read from safetensors alone, and of those only the parts that are needed",
        passed_over=(False,),
    ),
    MergekitOption(
        "write_model_card",
        ("--write-model-card/--no-write-model-card",),
        "switch",
        Effect.WORKS,
        "with `--no-write-model-card` README.md and mergekit_config.yml are left out; mergefs.json stays",
    ),
    MergekitOption(
        "safe_serialization",
        ("--safe-serialization/--no-safe-serialization",),
        "switch",
        Effect.REFUSED,
        "models are written as safetensors, since unpickling a file runs the code in it; leave the option out",
        passed_over=(True,),
    ),
    MergekitOption("verbosity", ("-v",), "count", Effect.WORKS, "says more, as it does before the command"),
    MergekitOption(
        "quiet",
        ("--quiet/--no-quiet",),
        "switch",
        Effect.WORKS,
        "shows no progress, no notes and no summary; `-q` is short for it",
    ),
    MergekitOption(
        "read_to_gpu", ("--read-to-gpu/--no-read-to-gpu",), "switch", Effect.REFUSED, _NO_GPU, passed_over=(False,)
    ),
    MergekitOption(
        "multi_gpu", ("--multi-gpu/--no-multi-gpu",), "switch", Effect.REFUSED, _NO_GPU, passed_over=(False,)
    ),
    MergekitOption(
        "num_threads",
        ("--num-threads", "-j"),
        "number",
        Effect.NOTHING,
        "what is computed does not depend on threads, and there is at most one more of them than cores",
    ),
    MergekitOption("gpu_rich", ("--gpu-rich",), "flag", Effect.REFUSED, _NO_GPU),
    MergekitOption(
        "async_write",
        ("--async-write/--no-async-write",),
        "switch",
        Effect.NOTHING,
        "a file is written while it is computed, piece by piece",
        passed_over=(False,),
    ),
    MergekitOption(
        "write_threads",
        ("--write-threads",),
        "number",
        Effect.NOTHING,
        "a file is written while it is computed, piece by piece",
    ),
    MergekitOption(
        "out_path",
        ("--out-path",),
        "text",
        Effect.WORKS,
        "the same as OUT as the last argument of `mergefs materialize`",
        tool=Tool.MULTI,
    ),
    MergekitOption(
        "intermediate_dir",
        ("--intermediate-dir", "-I"),
        "text",
        Effect.NOTHING,
        "a merge that another one merges is computed while it is read, and written nowhere",
        tool=Tool.MULTI,
    ),
    MergekitOption(
        "lazy",
        ("--lazy/--no-lazy",),
        "switch",
        Effect.NOTHING,
        "no merge is kept that could be skipped the next time; a model that is there already is replaced by "
        "`--overwrite` alone",
        tool=Tool.MULTI,
    ),
)
"""In the order of mergekit's own help."""
