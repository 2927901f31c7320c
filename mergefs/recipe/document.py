"""YAML read so that every value knows its line.

PyYAML composes the nodes (nothing in a document is ever executed or constructed by tag); what comes out is a small
immutable tree of scalars, sequences and tables. Duplicate keys, tags, and aliases that expand
to more than any recipe holds are refused here, so that what reads the tree need not think of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergefs.errors import RecipeError
from mergefs.recipe.wording import quote
from mergefs.units import format_size

MAXIMUM_SIZE: Final = 2**20  # bytes of a recipe file
_MAXIMUM_VALUES: Final = 50_000  # with aliases expanded
_MAXIMUM_DEPTH: Final = 64
_MAXIMUM_NUMBER_LENGTH: Final = 400  # characters; longer ones are slow to convert, and not floats

_TAG: Final = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (_TAG + kind for kind in ("null", "bool", "int", "float", "str"))
_MERGE: Final = _TAG + "merge"
_SCALAR_TAGS: Final = frozenset({_NULL, _BOOL, _INT, _FLOAT, _TEXT, _MERGE})
_DATE: Final = _TAG + "timestamp"


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a recipe; lines count from 1."""

    origin: str
    line: int

    def error(self, message: str) -> RecipeError:
        """Return (not raise) the error that says ``message`` about this line."""
        return RecipeError(f"{self.origin}:{self.line}: {message}")


@dataclass(frozen=True, slots=True)
class ScalarItem:
    """A single value, as YAML 1.1 reads it: ``1e-3`` without a dot is text there."""

    value: bool | int | float | str | None
    place: Place


@dataclass(frozen=True, slots=True)
class SequenceItem:
    """A list of values."""

    items: tuple["Item", ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Entry:
    """One ``key: value`` of a table; ``place`` is the key's."""

    key: str
    value: "Item"
    place: Place


@dataclass(frozen=True, slots=True)
class TableItem:
    """A mapping with distinct text keys, in the order of the file, merge keys (``<<``) resolved."""

    entries: Mapping[str, Entry]
    place: Place

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def get(self, key: str) -> Entry | None:
        """Return the entry of ``key``; None when it is absent or has no value (``key:`` or ``key: null``)."""
        entry = self.entries.get(key)
        return None if entry is None or is_null(entry.value) else entry


Item: TypeAlias = ScalarItem | SequenceItem | TableItem


def is_null(item: Item) -> bool:
    """Return whether ``item`` is YAML's null, which a key without a value has."""
    return isinstance(item, ScalarItem) and item.value is None


def describe(item: Item) -> str:
    """Return what ``item`` is, in words for an error message."""
    if isinstance(item, SequenceItem):
        return "a list"
    if isinstance(item, TableItem):
        return "a mapping"
    if item.value is None:
        return "nothing"
    return str(item.value).lower() if isinstance(item.value, bool) else quote(item.value)


def parse_documents(text: str, origin: str) -> tuple[Item, ...]:
    """Return the YAML documents in ``text``, at least one; ``origin`` names it in errors. Empty ones are left out.

    Raises RecipeError when it is too large, no YAML, empty, or holds what a recipe must not.
    """
    if len(text) > MAXIMUM_SIZE:
        raise too_large(origin)
    loader: _LimitedLoader | None = None
    try:
        loader = _LimitedLoader(text, origin)
        nodes = loader.documents()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, origin) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Place(origin, line).error(
            f"character U+{ord(text[error.position]):04X} is not allowed in YAML; remove it"
        ) from None
    except (ValueError, OverflowError):
        # PyYAML lets these escape for escapes and version numbers that are out of range.
        line = 1 if loader is None else loader.get_mark().line + 1
        raise Place(origin, line).error(
            "a number or a character code here is out of YAML's range; correct it"
        ) from None
    items = tuple(_Converter(origin).convert(node) for node in nodes)
    # A file may end in `---`, after which there is an empty document.
    return items if len(items) == 1 else tuple(item for item in items if not is_null(item)) or items[:1]


def too_large(origin: str) -> RecipeError:
    """Return the error for a recipe that is larger than ``MAXIMUM_SIZE``."""
    return RecipeError(
        f"{origin}: is larger than {format_size(MAXIMUM_SIZE)}, which no recipe is; give a mergekit YAML file"
    )


def empty(origin: str) -> RecipeError:
    """Return the error for a recipe without contents."""
    return RecipeError(f"{origin}: is empty; write a mergekit config with merge_method and models")


def _syntax_error(error: yaml.MarkedYAMLError, origin: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(part for part in (error.context, error.problem) if part) or "it cannot be parsed"
    if mark is not None and mark.buffer is not None and mark.buffer[mark.pointer : mark.pointer + 1] == "\t":
        return Place(origin, mark.line + 1).error(
            f"is not valid YAML (a tab in column {mark.column + 1}); put spaces in its place"
        )
    if mark is None:
        return RecipeError(f"{origin}: is not valid YAML ({problem}); correct the file")
    return RecipeError(
        f"{origin}:{mark.line + 1}: is not valid YAML ({problem}, column {mark.column + 1}); correct this line"
    )


class _LimitedLoader(yaml.SafeLoader):
    """Composes nodes while it counts what they expand to, so that no document takes long."""

    def __init__(self, text: str, origin: str):
        super().__init__(text)
        self._origin = origin
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by id of node; a node in the making has none

    def documents(self) -> list[Node]:
        nodes: list[Node] = []
        while self.check_node():
            node = self.get_node()
            if node is not None:
                nodes.append(node)
        if not nodes:
            raise empty(self._origin)
        return nodes

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self._next_event()
        place = self._place(event)
        alias: str | None = event.anchor if isinstance(event, yaml.AliasEvent) else None
        self._depth += 1
        if self._depth > _MAXIMUM_DEPTH:
            raise place.error(f"values are nested more than {_MAXIMUM_DEPTH} deep, which no recipe needs; flatten them")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if alias is not None:
            if id(node) not in self._sizes:
                raise place.error(f"the alias *{alias} stands inside of the value it names; write it out")
            return node
        size = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if size > _MAXIMUM_VALUES or len(self._sizes) > _MAXIMUM_VALUES:
            raise place.error(
                f"the recipe holds more than {_MAXIMUM_VALUES} values, aliases expanded, which no merge needs; "
                "shorten it"
            )
        self._sizes[id(node)] = size
        return node

    def _next_event(self) -> yaml.Event:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        return event

    def _place(self, event: yaml.Event) -> Place:
        return Place(self._origin, event.start_mark.line + 1 if event.start_mark else 1)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value


class _Converter:
    """Turns composed nodes into items; a node that aliases share is converted once."""

    def __init__(self, origin: str):
        self._origin = origin
        self._items: dict[int, Item] = {}
        self._scalars = yaml.constructor.SafeConstructor()

    def convert(self, node: Node) -> Item:
        item = self._items.get(id(node))
        if item is None:
            item = self._items[id(node)] = self._convert(node)
        return item

    def _convert(self, node: Node) -> Item:
        place = self._place(node)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return SequenceItem(tuple(self.convert(child) for child in node.value), place)
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._table(node)
        if isinstance(node, ScalarNode) and node.tag in _SCALAR_TAGS:
            return ScalarItem(self._scalar(node), place)
        if isinstance(node, ScalarNode) and node.tag == _DATE:
            raise place.error(f"YAML reads {quote(node.value)} as a date; put it in quotes when it is a name")
        if isinstance(node, ScalarNode) and node.tag == _TAG + "value":
            raise place.error("a lone = has a meaning of its own in YAML; put it in quotes when it is a name")
        raise place.error(f"the YAML tag {quote(node.tag)} is not supported in recipes; remove it")

    def _scalar(self, node: ScalarNode) -> bool | int | float | str | None:
        text: str = node.value
        if node.tag in (_INT, _FLOAT) and len(text) > _MAXIMUM_NUMBER_LENGTH:
            raise self._place(node).error(f"a number of {len(text)} digits is out of range; shorten it")
        try:
            if node.tag == _INT:
                return int(self._scalars.construct_yaml_int(node))
            if node.tag == _FLOAT:
                return float(self._scalars.construct_yaml_float(node))
            if node.tag == _BOOL:
                return bool(self._scalars.construct_yaml_bool(node))
        except (ValueError, KeyError, IndexError, OverflowError):
            kind = node.tag.removeprefix(_TAG)
            raise self._place(node).error(f"{quote(text)} is not of YAML's type {kind}; correct it") from None
        return None if node.tag == _NULL else text

    def _table(self, node: MappingNode) -> TableItem:
        merged: dict[str, Entry] = {}
        own: dict[str, Entry] = {}
        merge_line: int | None = None
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if key_node.tag == _MERGE:
                if merge_line is not None:
                    raise place.error(f"<< stands here for the second time, first in line {merge_line}; use a list")
                merge_line = place.line
                merged = self._merged(value_node)
                continue
            key_item = self.convert(key_node)
            if not isinstance(key_item, ScalarItem) or not isinstance(key_item.value, str):
                raise place.error(f"a key must be text, not {describe(key_item)}; put it in quotes")
            key = key_item.value
            if key in own:
                raise place.error(
                    f"the key {quote(key)} stands here for the second time, first in line "
                    f"{own[key].place.line}; keep one of them"
                )
            own[key] = Entry(key, self.convert(value_node), place)
        return TableItem(MappingProxyType({**merged, **own}), self._place(node))

    def _merged(self, node: Node) -> dict[str, Entry]:
        """Return the entries that a merge key brings in; of several mappings, the earlier ones win."""
        item = self.convert(node)
        tables = item.items if isinstance(item, SequenceItem) else (item,)
        entries: dict[str, Entry] = {}
        for table in tables:
            if not isinstance(table, TableItem):
                raise self._place(node).error(f"<< takes a mapping or a list of them, not {describe(table)}")
            entries = {**table.entries, **entries}
        return entries

    def _place(self, node: Node) -> Place:
        return Place(self._origin, node.start_mark.line + 1)
