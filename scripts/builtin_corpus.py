"""Collect documentation prose from the Python standard library that runs this script.

Three kinds of text, all read as files and parsed with ``ast`` (nothing is imported):

- *topics*: the language reference shipped as ``pydoc_data/topics.py``;
- *docstrings* of modules, classes and functions;
- *comments*: blocks of at least two comment lines that read as English.

The text is cleaned to paragraphs: wrapped lines are joined; code, grammar, tables, doctests, licence
notices and addresses are dropped; a paragraph that occurred before is dropped too, so that held-out text
is not also in the training text. The result depends on the standard library's files alone, in sorted
order.
"""

from __future__ import annotations

import ast
import hashlib
import re
import string
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = ["Document", "Kind", "collect", "is_held_out", "paragraphs_of", "stdlib_root"]

EXCLUDED_DIRS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "__pycache__", "lib-dynload"}
)
MAX_CHARS_PER_DOCUMENT = 2400
HELD_OUT_ONE_IN = 50

_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and any are as at be been but by can do does each for from has have if in is it its may must "
        "no not of on only or other return returns set should so than that the their then there these they "
        "this to use used was when where which will with you",
    )
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_OPENINGS = frozenset(string.ascii_letters + string.digits + "\"'(")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)])\s+")
_FIELD = re.compile(r"^\s*(?::\w+[^:]*:|@\w+)\s*")
_RULE = re.compile(r"^\s*([=\-*~^#_+.])\1{2,}\s*$")
_ROLE = re.compile(r":(?:\w+:)?\w+:`~?([^`]+)`")
_UNWANTED = re.compile(
    r"copyright|licen[sc]e|all rights reserved|warrant|permission|https?:|ftp:|www\.|\S@\S+\.\w|::=|>>>|"
    r"\bXXX\b|pylint|noqa|type: ignore|-\*-|\$Id|\bTODO\b|\bFIXME\b",
    re.IGNORECASE,
)


class Kind(Enum):
    """Say where a document's text stood."""

    TOPIC = "topic"
    DOCSTRING = "docstring"
    COMMENT = "comment"


@dataclass(frozen=True, slots=True)
class Document:
    """Hold one cleaned text; ``name`` is the dotted name or topic that it describes, empty for comments."""

    kind: Kind
    name: str
    what: str
    text: str


def stdlib_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(document: Document) -> bool:
    """Tell whether ``document`` is kept from training: about one in fifty, chosen by a digest of its text."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def collect(root: Path) -> list[Document]:
    """Return every document under ``root`` in a fixed order, each paragraph once.

    Files that are not UTF-8 or do not parse are skipped. Topics come first, so that the language
    reference keeps the paragraphs that docstrings repeat.
    """
    raw: list[Document] = list(_topics(root))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in EXCLUDED_DIRS or part.startswith("config-") for part in parts[:-1]):
            continue
        if parts[0] == "pydoc_data" or parts[-1].startswith(("_sysconfigdata", "test_")):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        module = ".".join(parts)[: -len(".py")].removesuffix(".__init__")
        raw += _docstrings(tree, module)
        raw += _comments(source)
    return _without_repeats(raw)


def paragraphs_of(text: str) -> list[str]:
    """Return the prose paragraphs of a docstring or topic, one line each, in order."""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line for line in block.splitlines() if line.strip() and not _RULE.match(line)]
        if not lines or any(line.lstrip().startswith((">>>", "$ ", ".. ")) for line in lines):
            continue
        for item in _items(lines):
            cleaned = _clean(item)
            if _is_prose(cleaned):
                paragraphs.append(cleaned)
    return paragraphs


def _topics(root: Path) -> Iterator[Document]:
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield Document(Kind.TOPIC, name, "topic", topics[name])


def _docstrings(tree: ast.Module, module: str) -> Iterator[Document]:
    stack: list[tuple[ast.AST, str, str]] = [(tree, module, "module")]
    while stack:
        node, name, what = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Document(Kind.DOCSTRING, name, what, docstring)
        children: list[tuple[ast.AST, str, str]] = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                children.append((child, f"{name}.{child.name}", "class"))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "method" if what == "class" else "function"
                children.append((child, f"{name}.{child.name}", kind))
            elif isinstance(child, ast.If | ast.Try):
                children.append((child, name, what))
        stack.extend(reversed(children))


def _comments(source: str) -> Iterator[Document]:
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!"):
            block.append(stripped.lstrip("#").removeprefix(" "))
            continue
        if len(block) >= 2:
            yield Document(Kind.COMMENT, "", "comment", "\n".join(block))
        block = []


def _items(lines: list[str]) -> Iterator[str]:
    """Split a block into its list items (or field descriptions) and join the wrapped lines of each."""
    item: list[str] = []
    for line in lines:
        if item and (_BULLET.match(line) or _FIELD.match(line)):
            yield " ".join(item)
            item = []
        item.append(line.strip())
    yield " ".join(item)


def _clean(item: str) -> str:
    text = _FIELD.sub("", _BULLET.sub("", item))
    text = _ROLE.sub(r"\1", text).replace("``", "").replace("`", "")
    text = text.translate(
        {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0xA0: " "}
    )
    text = re.sub(r"(?<!\w)\*{1,2}(\w+)\*{1,2}(?!\w)", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text[:-1] if text.endswith("::") else text


def _is_prose(text: str) -> bool:
    """Accept sentences: mostly letters, enough words, some of them common ones, no unwanted matter."""
    if _UNWANTED.search(text) or not text.isascii() or text[:1] not in _OPENINGS:
        return False
    words = _WORD.findall(text)
    num_plain = sum(character.isalpha() or character in " ,.'\"()" for character in text)
    if len(words) < 4 or num_plain < 0.9 * len(text):
        return False
    num_common = sum(word.lower() in _COMMON_WORDS for word in words)
    ends_well = text[-1] in ".:?!)"
    return num_common >= 0.2 * len(words) and (ends_well or len(words) >= 8)


def _without_repeats(raw: list[Document]) -> list[Document]:
    """Clean each document, drop paragraphs met before, and cut long documents into parts."""
    seen: set[str] = set()
    documents: list[Document] = []
    for document in raw:
        part: list[str] = []
        for paragraph in paragraphs_of(document.text):
            key = re.sub(r"[^a-z]+", " ", paragraph.lower())
            if key in seen:
                continue
            seen.add(key)
            if part and sum(map(len, part)) + len(paragraph) > MAX_CHARS_PER_DOCUMENT:
                documents.append(_part_of(document, part))
                part = []
            part.append(paragraph)
        if part:
            documents.append(_part_of(document, part))
    return documents


def _part_of(document: Document, paragraphs: list[str]) -> Document:
    return Document(document.kind, document.name, document.what, "\n\n".join(paragraphs))
