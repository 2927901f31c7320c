"""HTML pages taken apart by the standard library: what a test may ask of them."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Final

_VOID: Final = frozenset({"meta", "link", "br", "img", "input", "hr", "wbr"})
_LOADING: Final = frozenset({"src", "href", "srcset", "data", "action", "poster", "background"})


@dataclass
class Element:
    """One element: its attributes, the text in it, and what it lies in."""

    tag: str
    attributes: dict[str, str | None]
    parents: tuple[str, ...]
    text: str = ""

    @property
    def classes(self) -> frozenset[str]:
        return frozenset((self.attributes.get("class") or "").split())


@dataclass
class Page(HTMLParser):
    """All elements of a page, in order. Raises AssertionError where tags do not close each other as they should."""

    source: str
    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        assert not self._open, f"<{self._open[-1].tag}> is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs), tuple(parent.tag for parent in self._open))
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        closed = self._open.pop()
        assert closed.tag == tag, f"</{tag}> closes <{closed.tag}>"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        """Return the elements of a tag, and of a class."""
        return [e for e in self.elements if e.tag == tag and (name is None or name in e.classes)]

    def loaded(self) -> list[str]:
        """Return everything that a browser would fetch for the page."""
        found = [value or "" for e in self.elements for name, value in e.attributes.items() if name in _LOADING]
        styles = [e.text for e in self.all("style")] + [e.attributes.get("style") or "" for e in self.elements]
        return found + [style for style in styles if "url(" in style or "@import" in style]
