"""Configs that mergekit 0.1.5 refuses, one for each reason that its validators have.

``BASE``, ``FIRST``, ``SECOND``, ``ADAPTER`` and ``FOREIGN`` stand for models of a ``World``. The line that is to blame
ends in ``# here``; without one, no single line is.
"""

from dataclasses import dataclass
from typing import Final

from worlds import LAYERS

HERE: Final = "# here"

MODELS: Final = """\
merge_method: ties
base_model: BASE
models:
- model: FIRST
  parameters: {weight: 0.5, density: 0.6}
- model: SECOND
  parameters: {weight: 0.4}
dtype: bfloat16
"""
SLICES: Final = """\
merge_method: slerp
base_model: BASE
slices:
- sources:
  - model: BASE
    layer_range: [0, 2]
  - model: FIRST
    layer_range: [1, 3]
parameters: {t: 0.4}
"""
MODULES: Final = """\
merge_method: linear
modules:
  default:
    models:
    - model: FIRST
    - model: SECOND
parameters: {weight: 0.5}
"""
VOCABULARY: Final = """\
merge_method: linear
models:
- model: FIRST
- model: FOREIGN
parameters: {weight: 0.5}
chat_template: chatml
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    w5: {source: FIRST, force: true}
    v5: {source: {kind: model_token, model: FOREIGN, token: v8}}
    w6: {source: {kind: zero}}
"""
DELLA: Final = """\
merge_method: della
base_model: BASE
models:
- model: FIRST
parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
"""
SEVERAL: Final = """\
name: inner
merge_method: passthrough
models:
- model: FIRST
---
merge_method: linear
models:
- model: inner
- model: SECOND
parameters: {weight: [0.1, 0.5]}
"""
SOUND: Final[dict[str, str]] = {
    "models": MODELS,
    "slices": SLICES,
    "modules": MODULES,
    "vocabulary": VOCABULARY,
    "della": DELLA,
    "several": SEVERAL,
}
"""Configs that both take, of which each bad one is a change."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A change of a sound config; ``words`` is what our sentence must say about it, ``theirs`` what mergekit says."""

    sound: str
    before: str
    after: str
    words: str
    theirs: str

    @property
    def text(self) -> str:
        """The whole config."""
        assert self.sound.count(self.before) == 1, self.before
        return self.sound.replace(self.before, self.after)


_AFTER_DTYPE: Final = "dtype: bfloat16"
_SOURCE: Final = "    layer_range: [1, 3]"
_NO_TOKEN: Final = "{source: {kind: model_token, model: FOREIGN, token: v8}}"

REFUSED: Final[dict[str, Refused]] = {
    # config.py: the document
    "nothing to merge": Refused(MODULES, MODULES, "merge_method: linear # here\n", "no models", "Exactly one of"),
    "an empty list": Refused(
        MODULES, MODULES, "merge_method: linear\nmodels: [] # here\n", "'models' is empty", "Exactly one of"
    ),
    "models and slices": Refused(
        MODELS,
        _AFTER_DTYPE,
        "slices: [{sources: [{model: BASE, layer_range: [0, 1]}]}] # here",
        "'slices' stands here beside 'models'",
        "Exactly one of",
    ),
    "models and modules": Refused(
        MODELS,
        _AFTER_DTYPE,
        "modules: {default: {models: [{model: BASE}]}} # here",
        "'modules' stands here beside 'models'",
        "Exactly one of",
    ),
    "a module with models and slices": Refused(
        MODULES,
        "  default:\n",
        "  default: # here\n    slices: [{sources: [{model: BASE, layer_range: [0, 1]}]}]\n",
        "both 'models' and 'slices'",
        "either output slices or models",
    ),
    "a module with nothing": Refused(
        MODULES,
        "    models:\n    - model: FIRST\n    - model: SECOND\n",
        "    parameters: {weight: 1}\n",
        "neither 'models' nor 'slices'",
        "either output slices or models",
    ),
    "no method": Refused(
        MODELS, "merge_method: ties\nbase_model: BASE", "base_model: BASE # here", "no merge_method", "Field required"
    ),
    "a method that is a number": Refused(MODELS, "ties", "7 # here", "not 7", "valid string"),
    "an unknown method": Refused(MODELS, "ties", "tise # here", "did you mean 'ties'", "Unimplemented merge method"),
    "models as a mapping": Refused(
        MODULES,
        "  default:\n    models:\n    - model: FIRST\n    - model: SECOND\n",
        "  default:\n    models: {model: FIRST} # here\n",
        "'models' must be a list",
        "valid list",
    ),
    "modules as a list": Refused(
        MODULES,
        "  default:\n    models:\n    - model: FIRST\n    - model: SECOND\n",
        "  - models # here\n",
        "'modules' must be a mapping",
        "valid dictionary",
    ),
    "a model that is text": Refused(
        MODELS,
        "- model: SECOND\n  parameters: {weight: 0.4}",
        "- SECOND # here",
        "must be a mapping",
        "valid dictionary",
    ),
    "an entry without a model": Refused(
        MODELS, "- model: SECOND\n  parameters", "- parameters", "names no model", "Field required"
    ),
    "a dtype that is a number": Refused(MODELS, "bfloat16", "16 # here", "'dtype' must be one of", "valid string"),
    "a dtype that is none": Refused(
        MODELS, "bfloat16", "float8 # here", "'dtype' must be one of.*not 'float8'", "Unimplemented dtype"
    ),
    "an output dtype that is none": Refused(
        MODELS,
        _AFTER_DTYPE,
        "out_dtype: half # here",
        "'out_dtype' must be one of.*not 'half'",
        "Unimplemented dtype",
    ),
    # config.py: slices
    "a source without layers": Refused(SLICES, f"FIRST\n{_SOURCE}", "FIRST # here", "no layer_range", "Field required"),
    "three layers": Refused(
        SLICES, _SOURCE, "    layer_range: [1, 2, 3] # here", "two whole numbers", "at most 2 items"
    ),
    "one layer": Refused(SLICES, _SOURCE, "    layer_range: [1] # here", "two whole numbers", "Field required"),
    "layers in words": Refused(
        SLICES, _SOURCE, "    layer_range: [one, 3] # here", "two whole numbers", "valid integer"
    ),
    "half a layer": Refused(
        SLICES, _SOURCE, "    layer_range: [0.5, 2.5] # here", "two whole numbers", "valid integer"
    ),
    "a range that is no list": Refused(
        SLICES, _SOURCE, "    layer_range: 3 # here", "two whole numbers", "valid tuple"
    ),
    "a slice without sources": Refused(
        SLICES, "parameters: {t", "- parameters: {} # here\nparameters: {t", "no list of sources", "Field required"
    ),
    "sources as a mapping": Refused(
        SLICES, "parameters: {t", "- sources: {model: BASE} # here\nparameters: {t", "no list of sources", "valid list"
    ),
    "a residual weight in words": Refused(
        SLICES, "- sources:\n", "- residual_weight: much # here\n  sources:\n", "'residual_weight'", "valid number"
    ),
    # config.py: parameters
    "parameters as a list": Refused(
        MODELS, "{weight: 0.4}", "[0.4] # here", "'parameters' must be a mapping", "valid dictionary"
    ),
    "a parameter without a value": Refused(
        MODELS, "{weight: 0.4}", "{weight: } # here", "'weight' has no value", "valid"
    ),
    "a condition without a value": Refused(
        MODELS, "{weight: 0.4}", "{weight: [{filter: mlp}]} # here", "has no value", "Field required"
    ),
    "a filter that is a number": Refused(
        MODELS,
        "{weight: 0.4}",
        "{weight: {filter: 3, value: 1}} # here",
        "filter of 'weight' must be text",
        "valid string",
    ),
    "a gradient with a list in it": Refused(
        MODELS, "{weight: 0.4}", "{weight: [0.1, [0.2]]} # here", "a single value of 'weight'", "valid"
    ),
    "conditions and numbers": Refused(
        MODELS, "{weight: 0.4}", "{weight: [0.1, {value: 0.2}]} # here", "mixes conditions", "valid"
    ),
    "a gradient of words": Refused(MODELS, "{weight: 0.4}", "{weight: [0.1, some]} # here", "'some'", "valid number"),
    # common.py: references
    "a model that is a number": Refused(MODELS, "model: SECOND", "model: 2024 # here", "in quotes", "valid dictionary"),
    "two adapters": Refused(MODELS, "model: SECOND", "model: SECOND+a+b # here", "MODEL\\+ADAPTER", "Can't parse"),
    "two revisions": Refused(MODELS, "model: SECOND", "model: SECOND@a@b # here", "more than one @", "multiple @"),
    "a reference without a model": Refused(
        MODELS, "model: SECOND", "model: {lora: ADAPTER} # here", "has no model", "Field required"
    ),
    "a location without a path": Refused(
        MODELS, "model: SECOND", "model: {model: {revision: a}} # here", "has no path", "Field required"
    ),
    "a base that is a list": Refused(MODELS, "base_model: BASE", "base_model: [BASE] # here", "must be text", "valid"),
    "a model that is nowhere": Refused(
        MODELS, "model: SECOND", "model: /nowhere/model # here", "'/nowhere/model'", "/nowhere/model"
    ),
    "an adapter that is nowhere": Refused(
        MODELS, "model: SECOND", "model: BASE+/nowhere/adapter # here", "'/nowhere/adapter'", "/nowhere/adapter"
    ),
    # base.py and plan.py: which models a method takes
    "a model twice": Refused(MODELS, "model: SECOND", "model: FIRST # here", "second time", "Duplicate merge inputs"),
    "a base that is not in its slice": Refused(
        SLICES,
        "- sources:\n  - model: BASE",
        "- sources: # here\n  - model: SECOND",
        "not among the sources",
        "Base input is not present",
    ),
    "a module without the base of its method": Refused(
        MODULES,
        "linear\nmodules:\n  default:\n    models:\n",
        "ties\nmodules:\n  default:\n    models: # here\n",
        "ties needs a base model",
        "requires a base input",
    ),
    "sources of different lengths": Refused(
        SLICES,
        "  - model: FIRST\n    layer_range: [1, 3]",
        "  - model: FIRST # here\n    layer_range: [0, 3]",
        "ranges of one length",
        "same number of layers",
    ),
    "layers that are not there": Refused(
        SLICES,
        "[0, 2]\n  - model: FIRST\n    layer_range: [1, 3]",
        f"[0, 2]\n  - model: FIRST\n    layer_range: [{LAYERS - 1}, {LAYERS + 1}]",
        f"beyond its {LAYERS} layers",
        "required but not present",
    ),
    "a module that is not there": Refused(MODULES, "default", "vision", "'vision'", "vision"),
    # parameter_resolver.py
    "a parameter that is missing": Refused(
        MODELS,
        "- model: SECOND\n  parameters: {weight: 0.4}",
        "- model: SECOND # here",
        "needs the parameter 'weight'",
        "Missing required parameter weight",
    ),
    "a parameter that some tensors miss": Refused(
        MODELS,
        "{weight: 0.4}",
        "{weight: [{filter: mlp, value: 0.4}]}",
        "'weight'",
        "Missing required parameter weight",
    ),
    "a parameter that is an empty list": Refused(
        MODELS,
        "{weight: 0.4}",
        "{weight: []} # here",
        "the list of 'weight' is empty",
        "Missing required parameter weight",
    ),
    # sparsify.py
    "an epsilon that is too large": Refused(DELLA, "epsilon: 0.1", "epsilon: 0.5", "epsilon", "Epsilon must be chosen"),
    # tokenizer/config.py
    "two tokenizers": Refused(
        VOCABULARY,
        "tokenizer:\n",
        "tokenizer_source: base\ntokenizer: # here\n",
        "cannot be used together",
        "both tokenizer_source and tokenizer",
    ),
    "a vocabulary that is a list": Refused(VOCABULARY, "source: union", "source: [union] # here", "text", "valid"),
    "a multiple in words": Refused(VOCABULARY, "_of: 8", "_of: eight # here", "whole number", "valid integer"),
    "half a multiple": Refused(VOCABULARY, "_of: 8", "_of: 8.5 # here", "whole number", "valid integer"),
    "tokens as a list": Refused(
        VOCABULARY,
        VOCABULARY[VOCABULARY.index("  tokens:") :],
        "  tokens: [w5] # here\n",
        "'tokens' must be a mapping",
        "valid dictionary",
    ),
    "a token that is text": Refused(
        VOCABULARY, "{source: FIRST, force: true}", "FIRST # here", "mapping", "valid dict"
    ),
    "force in words": Refused(VOCABULARY, "force: true}", "force: perhaps} # here", "true or false", "valid boolean"),
    "a token of no kind": Refused(
        VOCABULARY, "{kind: zero}}", "{kind: one}} # here", "not a kind of source", "valid|kind"
    ),
    "a token of no model": Refused(
        VOCABULARY, _NO_TOKEN, "{source: {kind: model_token, token: v8}} # here", "names no model", "valid|required"
    ),
    "a token of a model that is not merged": Refused(
        VOCABULARY, "{source: FIRST, force: true}", "{source: SECOND} # here", "takes no part", "vocabulary weight from"
    ),
    # merge.py
    "a chat template that is none": Refused(
        VOCABULARY, "chatml", "chatlm # here", "not a chat template", "Invalid chat templ"
    ),
    "a chat template that is a number": Refused(VOCABULARY, "chatml", "3 # here", "must be auto", "valid string"),
    # scripts/multimerge.py
    "a name twice": Refused(
        SEVERAL, "---\nmerge", "---\nname: inner # here\nmerge", "is taken by another", "Duplicate merge name"
    ),
    "two results": Refused(
        SEVERAL, "name: inner\n", "", "a second document without a name", "Multiple unnamed merge configurations"
    ),
    "a circle": Refused(SEVERAL, "FIRST", "inner", "in a circle", "Circular dependency"),
    # YAML
    "no YAML": Refused(MODELS, "{weight: 0.4}", "{weight: 0.4]} # here", "not valid YAML", "parsing|expected"),
    "an alias of nothing": Refused(MODELS, "{weight: 0.4}", "*nothing # here", "undefined alias", "undefined alias"),
    "a tag": Refused(
        MODELS, "{weight: 0.4}", "!mine {weight: 0.4} # here", "tag '!mine'", "could not determine a const"
    ),
    "a number as a word": Refused(
        MODELS, "{weight: 0.4}", "!!int {weight: 0.4} # here", "tag", "expected a scalar node"
    ),
    "a document that is a list": Refused(MODULES, MODULES, "- a # here\n", "a recipe is a mapping", "valid dictionary"),
    "an empty document": Refused(MODULES, MODULES, "# nothing\n", "is empty", "valid dictionary"),
}
