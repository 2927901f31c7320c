"""The demo's text: three domains that every Python installation carries, split into training and held-out bytes.

Nothing is downloaded. A document goes to one side of the split by the hash of its contents, and no paragraph of
some length is kept twice, so held-out text is text that no training step has seen.
"""

import ast
import hashlib
import importlib
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.errors import MergefsError

TRAINING_LIMIT: Final = 3 << 20
"""Bytes of training text that a domain keeps at most."""

HELD_OUT_LIMIT: Final = 192 << 10
"""Bytes of held-out text at which a domain has enough; a tenth of its text where that is less."""

MINIMUM_TRAINING: Final = 128 << 10
"""Bytes of training text under which a domain is not worth a fine-tuned expert."""

UNIQUE_PARAGRAPH: Final = 64
"""Bytes from which on a paragraph may occur only once in a domain (shorter ones are blank lines and brackets)."""

_HELD_OUT_DOCUMENT_LIMIT: Final = 16 << 10  # so that no single large file is the whole yardstick
_READ_LIMIT: Final = 512 << 10  # of one file: generated tables go on for megabytes

_SKIPPED_FOLDERS: Final = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_UNNAMED_SCRIPTS: Final = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU CHARACTER", "KHITAN ", "EGYPTIAN HIEROGLYPH")


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of text: its short name, its title for people, and its UTF-8 bytes in two disjoint parts."""

    name: str
    title: str
    training: bytes
    held_out: bytes


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a domain's documents come from; read only when the domain is wanted."""

    name: str
    title: str
    documents: Callable[[], Iterable[bytes]]


def load_domains() -> tuple[Domain, ...]:
    """Return the three domains of the demo, the same ones in the same order on every call.

    They are Python sources, prose, and C headers. Where the help topics or the headers are not installed, docstrings
    and the table of Unicode characters stand in for them.
    Raises MergefsError when this Python installation has too little text even so.
    """
    wanted = (
        (_Source("python", "Python sources of the standard library", _python_sources),),
        (
            _Source("prose", "Python's help topics", _help_topics),
            _Source("prose", "docstrings of the standard library", _docstrings),
        ),
        (
            _Source("c", "C headers of Python", _c_headers),
            _Source("unicode", "the table of Unicode characters", _unicode_table),
        ),
    )
    return tuple(_first_with_enough_text(sources) for sources in wanted)


def _first_with_enough_text(sources: Sequence[_Source]) -> Domain:
    """Return the domain of the first source that has enough text, or raise MergefsError."""
    for source in sources:
        domain = split_documents(source.name, source.title, source.documents())
        if len(domain.training) >= MINIMUM_TRAINING:
            return domain
    titles = " or ".join(source.title for source in sources)
    raise MergefsError(
        f"the demo needs {MINIMUM_TRAINING} bytes of {titles} to train on, and {sys.prefix} has less; "
        "run it with a Python that has its standard library in files, such as one from python.org"
    )


def split_documents(name: str, title: str, documents: Iterable[bytes]) -> Domain:
    """Return the domain made of ``documents``, each wholly in one of the two parts (or left out).

    The order and the split follow the documents' hashes, not the order in which they come. No paragraph of
    UNIQUE_PARAGRAPH bytes or more occurs twice in the domain.
    """
    by_hash = {hashlib.sha256(document).digest(): document for document in documents}
    ordered = [by_hash[digest] for digest in sorted(by_hash)]
    held_out_limit = min(HELD_OUT_LIMIT, sum(map(len, ordered)) // 10)
    seen: set[bytes] = set()
    pieces: dict[str, list[bytes]] = {"held out": [], "training": []}
    held_out_size = training_size = 0
    for document in ordered:
        if held_out_size < held_out_limit:
            piece = _unique_paragraphs(document, seen, _HELD_OUT_DOCUMENT_LIMIT)
            held_out_size += len(piece)
            pieces["held out"].append(piece)
        elif training_size < TRAINING_LIMIT:
            piece = _unique_paragraphs(document, seen, TRAINING_LIMIT - training_size)
            training_size += len(piece)
            pieces["training"].append(piece)
    return Domain(name, title, b"".join(pieces["training"]), b"".join(pieces["held out"]))


def _unique_paragraphs(document: bytes, seen: set[bytes], limit: int) -> bytes:
    """Return the paragraphs of ``document`` that are not in ``seen``, up to ``limit`` bytes, and add them to it."""
    kept: list[bytes] = []
    size = 0
    for paragraph in document.replace(b"\r\n", b"\n").split(b"\n\n"):
        if size + len(paragraph) + 2 > limit:
            break
        text = paragraph.strip()
        if len(text) >= UNIQUE_PARAGRAPH:
            if text in seen:
                continue
            seen.add(text)
        kept.append(paragraph + b"\n\n")
        size += len(paragraph) + 2
    return b"".join(kept)


def _python_sources() -> Iterator[bytes]:
    """Yield one half of the library's sources; the docstrings of the other half can stand in for prose."""
    return (text for text in _library_files() if not _is_for_docstrings(text))


def _docstrings() -> Iterator[bytes]:
    """Yield for each module of the other half of the library all its docstrings, as one document."""
    for text in _library_files():
        if _is_for_docstrings(text):
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
            yield "".join(f"{docstring}\n\n" for docstring in found if docstring).encode()


def _is_for_docstrings(text: bytes) -> bool:
    """Say which half of the library a source belongs to, so that the two halves share no file."""
    return hashlib.sha256(b"half" + text).digest()[0] % 2 == 1


def _help_topics() -> Iterator[bytes]:
    """Yield the texts behind ``help("topic")``; none where the installation leaves them out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    yield from (text.encode() for text in topics.values() if isinstance(text, str))


def _c_headers() -> Iterator[bytes]:
    """Yield the headers that extension modules are compiled against; many distributions ship them apart."""
    return _text_files(Path(sysconfig.get_path("include")), "*.h")


def _library_files() -> Iterator[bytes]:
    """Yield the sources of the standard library, without its tests and tables."""
    return _text_files(Path(sysconfig.get_path("stdlib")), "*.py")


def _text_files(root: Path, pattern: str) -> Iterator[bytes]:
    """Yield the UTF-8 files under ``root``, the first _READ_LIMIT bytes of each; unreadable ones are left out."""
    for path in root.rglob(pattern):
        folders = path.relative_to(root).parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with path.open("rb") as file:
                text = file.read(_READ_LIMIT)
        except OSError:
            continue
        if _is_text(text):
            yield text


def _is_text(data: bytes) -> bool:
    """Say whether ``data`` is UTF-8 (a character cut off at its end is forgiven)."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.end == len(data) and error.reason == "unexpected end of data"
    return True


def _unicode_table() -> Iterator[bytes]:
    """Yield the table of Unicode characters, each document the lines of 64 code points in paragraphs of eight."""
    for first in range(0, sys.maxunicode + 1, 64):
        lines = [line for code in range(first, first + 64) if (line := _unicode_line(chr(code)))]
        if lines:
            paragraphs = ("\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8))
            yield "".join(f"{paragraph}\n\n" for paragraph in paragraphs).encode()


def _unicode_line(character: str) -> str | None:
    """Return the table's line for ``character``, or None when it has no name, or one made from its number."""
    name = unicodedata.name(character, "")
    if not name or name.startswith(_UNNAMED_SCRIPTS):
        return None
    category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
    return f"U+{ord(character):04X} {category} {direction} {name} ({character})"
