"""Recipes at random: from a grammar that knows every form of one, spoilt at random afterwards.

Recipes are made by a generator of random numbers, which hypothesis seeds: drawing each of hundreds of choices from
hypothesis itself would take longer than planning the recipe.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import yaml
from worlds import LAYERS, World

from mergefs.methods.contract import Parameter, Scope, Specification
from mergefs.methods.registry import METHODS

FILTERS: Final = ("self_attn", "mlp", "norm", "embed_tokens", "lm_head", "*", "q_proj", "weight", "no_such_tensor")
DTYPES: Final = ("bfloat16", "float16", "float32", "torch.float32", "float64")
CHAT_TEMPLATES: Final = ("auto", "chatml", "llama3", "{{ messages[0]['content'] }} and nothing else")
EXTREMES: Final[tuple[Any, ...]] = (
    *(0, -1, 1, 2, 2**31, -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 1e-300, 5e-324, 1e300, 1.7e308, -1e308),
    *(math.nan, math.inf, -math.inf, 0.1 + 0.2, 1.5, True, False, None, "", " ", "~", "null", "nan", "inf", "1e-3"),
    *("0x10", "1_000", "1:30", "2024-01-31", "=", "<<", "yes", "off", "*", "&a", "!!int 3", "\x00", "\x1b[31mred"),
    *("a\nb", "a\tb", "\u202e", "\ud7ff", "\U0001f600", "\x85", "\u2028", "é" * 200, "%s %d {}", "{0}", "../..", "/"),
    *("a+b", "a@b", "a+b@c+d", "+", "@", "~", "~root/x", ".", "union", "base", "ties", "linear", [], {}, [[]], [{}]),
)
STRANGE_KEYS: Final = (
    *("wieght", "layer_range", "lora", "model", "models", "slices", "parameters", "<<", "filter", "value", "name", ""),
    *("\x1b[0m", "key with spaces", "merge_method", "density", "t", "sources", "tokens", "kind", "path", "revision"),
)
PIECES: Final = (
    *(
        b"\x00",
        b"\xff",
        b"\x1b",
        b"\xc3\x28",
        b"\xef\xbb\xbf",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!int ",
        b"!!binary ",
        b"[",
        b"]",
    ),
    *(b"{", b"}", b": ", b"- ", b"\n", b"\r", b"\t", b"'", b'"', b"|", b">", b"~", b"---\n", b"...\n", b"%TAG ! x\n"),
    *(b"? ", b"#", b"1e999", b".nan", b"0" * 50, b"\xe2\x80\xa8", b"\\x", b"\\u12", b",", b"@", b"`"),
)


class Grammar:
    """Writes recipes for a world; each call of ``documents`` another one."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world = world
        self._chance = chance

    def documents(self) -> list[Any]:
        """Return the documents of a recipe that is right or nearly so."""
        names = ["inner", "middle"][: self._chance.choice([0, 0, 0, 0, 1, 1, 2])]
        documents = [{"name": name, **self._document(names[:number])} for number, name in enumerate(names)]
        return [*documents, self._document(names)]

    def _often(self, share: float) -> bool:
        return self._chance.random() < share

    def _document(self, results: list[str]) -> dict[str, Any]:
        """Return one document, which may merge the ``results`` of others."""
        world = self._world
        method = self._chance.choice(list(METHODS.values())).specification
        models: list[str] = [str(world.first), str(world.second), world.adapted, *results]
        models += [str(world.foreign)] * self._often(0.15) + [str(world.adapter)] * self._often(0.1)
        self._chance.shuffle(models)
        base: str | None = str(world.base)
        if method.base.name != "REQUIRED" and self._often(0.6):
            base = None
        if results and self._often(0.2):
            base = results[-1]
        least = max(method.min_models - (base is not None), method.min_experts, 1)
        most = min(method.max_models or 4, (method.max_experts or 4) + (base is not None)) - (base is not None)
        chosen = models[: self._chance.randint(least, max(least, min(most, len(models))))]
        document: dict[str, Any] = {"merge_method": method.name}
        if base is not None:
            document["base_model"] = base
        document |= self._structure(method, chosen, base)
        shared = self._parameters(method, lambda parameter: parameter.scope is Scope.GLOBAL)
        if method.parameter("weight") and self._often(0.5):
            shared["weight"] = self._setting(METHODS[method.name].specification.parameter("weight"))
        if shared:
            document["parameters"] = shared
        for key in ("dtype", "out_dtype"):
            if self._often(0.3):
                document[key] = self._chance.choice(DTYPES)
        if self._often(0.25):
            document |= self._tokenizer([*chosen, *([base] if base else [])])
        if self._often(0.1):
            document["chat_template"] = self._chance.choice(CHAT_TEMPLATES)
        return document

    def _structure(self, method: Specification, models: list[str], base: str | None) -> dict[str, Any]:
        form = self._chance.choice(["models", "models", "slices", "modules"])
        if form == "models":
            return {"models": self._models(method, models)}
        if form == "slices":
            return {"slices": self._slices(method, models, base)}
        inner = {"models": self._models(method, models)}
        if self._often(0.5):
            inner = {"slices": self._slices(method, models, base)}
        return {"modules": {"default": inner}}

    def _models(self, method: Specification, models: list[str]) -> list[Any]:
        return [self._entry(method, model) for model in models]

    def _slices(self, method: Specification, models: list[str], base: str | None) -> list[Any]:
        listed = [*models, *([base] if base is not None and base not in models else [])]
        slices = []
        for _ in range(self._chance.randint(1, 3)):
            length = self._chance.randint(1, LAYERS)
            sources = []
            for model in listed:
                first = self._chance.randint(0, LAYERS - length)
                sources.append({**self._entry(method, model), "layer_range": [first, first + length]})
            slices.append({"sources": sources})
        return slices

    def _entry(self, method: Specification, model: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"model": self._reference(model)}
        parameters = self._parameters(method, lambda parameter: parameter.scope is not Scope.GLOBAL)
        return entry | ({"parameters": parameters} if parameters else {})

    def _reference(self, model: str) -> Any:
        if self._often(0.85):
            return model
        path, _, lora = model.partition("+")
        mapping: dict[str, Any] = {"model": {"path": path}}
        return mapping | ({"lora": {"path": lora}} if lora else {})

    def _parameters(self, method: Specification, wanted: Callable[[Parameter], bool]) -> dict[str, Any]:
        found = [parameter for parameter in method.parameters if wanted(parameter)]
        return {p.name: self._setting(p) for p in found if p.required or self._often(0.5)}

    def _setting(self, parameter: Parameter | None) -> Any:
        """Return a value, a gradient or conditions."""
        assert parameter is not None
        form = self._chance.random()
        if form < 0.6:
            return self._value(parameter)
        if form < 0.8:
            return [self._value(parameter) for _ in range(self._chance.choice([1, 2, LAYERS, 5]))]
        conditions = [
            {"filter": self._chance.choice(FILTERS), "value": self._setting_of_condition(parameter)}
            for _ in range(self._chance.randint(0, 2))
        ]
        return [*conditions, {"value": self._setting_of_condition(parameter)}]

    def _setting_of_condition(self, parameter: Parameter) -> Any:
        return self._value(parameter) if self._often(0.7) else [self._value(parameter) for _ in range(2)]

    def _value(self, parameter: Parameter) -> Any:
        if self._often(0.04):
            return self._chance.choice(EXTREMES[:22])
        if parameter.kind == "bool":
            return self._chance.choice([True, False])
        if parameter.kind == "int":
            return self._chance.randint(0, 5)
        low = -0.5 if parameter.minimum is None else parameter.minimum
        high = 1.5 if parameter.maximum is None else parameter.maximum
        return self._chance.choice([low, high, round(self._chance.uniform(low, high), 3), 0.5])

    def _tokenizer(self, models: list[str]) -> dict[str, Any]:
        source = self._chance.choice(["union", "base", self._chance.choice(models)])
        if self._often(0.3):
            return {"tokenizer_source": source}
        tokenizer: dict[str, Any] = {"source": source}
        if self._often(0.5):
            tokenizer["pad_to_multiple_of"] = self._chance.choice([1, 8, 64])
        if self._often(0.6):
            tokenizer["tokens"] = {
                token: self._token(models) for token in self._chance.sample(["w3", "v5", "<s>", "<new>", "w9"], 2)
            }
        return {"tokenizer": tokenizer}

    def _token(self, models: list[str]) -> dict[str, Any]:
        model = self._chance.choice(models)
        source: Any = self._chance.choice(
            [
                model,
                {"kind": "zero"},
                {"kind": "model_token", "model": model, "token": "w4"},
                {"kind": "model_token", "model": model, "token_id": 3},
            ]
        )
        return {"source": source} | ({"force": True} if self._often(0.3) else {})


Branch = dict[Any, Any] | list[Any]


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a document: a key of a mapping or an index of a list."""

    owner: Branch
    key: Any


def _spots(value: Any) -> list[Spot]:
    found: list[Spot] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append(Spot(value, key))
        found += _spots(value[key])
    return found


def spoil(documents: list[Any], chance: random.Random) -> None:
    """Change one thing somewhere: drop, repeat, rename, retype, nest, exchange, share or reorder it."""
    spots = _spots(documents)
    if not spots:
        documents.append(chance.choice(EXTREMES))
        return
    spot = chance.choice(spots)
    value = spot.owner[spot.key]
    other = chance.choice(spots)
    change = chance.randrange(9)
    if change == 0:
        del spot.owner[spot.key]
    elif change == 1 and isinstance(spot.owner, list):
        spot.owner.insert(chance.randrange(len(spot.owner) + 1), value)
    elif change == 2 and isinstance(spot.owner, dict):
        del spot.owner[spot.key]
        spot.owner[chance.choice([*STRANGE_KEYS, *EXTREMES[:40]])] = value
    elif change == 3:
        spot.owner[spot.key] = [value] if chance.random() < 0.5 else {chance.choice(STRANGE_KEYS): value}
    elif change == 4 and not _contains(value, other.owner) and not _contains(other.owner[other.key], spot.owner):
        spot.owner[spot.key], other.owner[other.key] = other.owner[other.key], value
    elif change == 5 and not _contains(other.owner[other.key], spot.owner):
        spot.owner[spot.key] = other.owner[other.key]  # YAML writes what is shared as an anchor and an alias
    elif change == 6 and isinstance(spot.owner, list):
        chance.shuffle(spot.owner)
    elif change == 7 and isinstance(spot.owner, dict):
        spot.owner[chance.choice(STRANGE_KEYS)] = chance.choice(EXTREMES)
    else:
        spot.owner[spot.key] = chance.choice(EXTREMES)


def _contains(value: Any, wanted: Any) -> bool:
    if value is wanted:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains(one, wanted) for one in inner)


def to_yaml(documents: list[Any], chance: random.Random) -> bytes:
    """Return documents as YAML in one of its styles; a key ``<<`` merges, and aliases stand for what is shared."""
    style: bool | None = chance.choice([None, False, True])
    try:
        text = yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=style, allow_unicode=True)
    except (TypeError, RecursionError, yaml.YAMLError):  # keys that are lists, and the like
        text = repr(documents)
    return text.replace("'<<':", "<<:").encode("utf-8", errors="surrogatepass")


def spoil_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip a bit, insert, repeat or remove a line, cut out some bytes, or cut the rest off."""
    place = chance.randrange(len(data) + 1)
    lines = data.splitlines(keepends=True)
    line = chance.randrange(len(lines)) if lines else 0
    change = chance.randrange(6)
    if change == 0 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    if change == 1:
        return data[:place]
    if change == 2:
        return data[:place] + data[place + chance.randrange(1, 12) :]
    if change == 3 and lines:
        return b"".join([*lines[: line + 1], *lines[line:]])
    if change == 4 and lines:
        return b"".join([*lines[:line], *lines[line + 1 :]])
    return data[:place] + chance.choice(PIECES) + data[place:]


def random_recipe(world: World, seed: int) -> bytes:
    """Return the recipe of ``seed``: some as the grammar has it, most with a few things spoilt."""
    chance = random.Random(seed)
    documents = Grammar(world, chance).documents()
    for _ in range(chance.choice([0, 0, 0, 1, 1, 2, 5])):
        spoil(documents, chance)
    data = to_yaml(documents, chance)
    for _ in range(chance.choice([0, 0, 0, 0, 0, 0, 1, 3])):
        data = spoil_bytes(data, chance)
    return data
