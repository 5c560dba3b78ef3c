"""The built-in text: the documentation that every CPython carries, split by topic.

The text is read when it is needed and never copied into this package: its licence stays with
the interpreter, and it differs between Python versions. Figures measured on it are therefore
comparable only where `BuiltinText.sha256` is the same.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kdrun.errors import InputError

HELD_OUT_SHARE: Final = 0.12

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_SKIPPED_FOLDERS: Final = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
)


@dataclass(frozen=True)
class BuiltinText:
    """Documents to train on and documents to measure on; no paragraph stands in both.

    Attributes:
        train: One text per training topic, ordered by the topic's name.
        held_out: One text per held-out topic, ordered by the topic's name.
        sha256: Hash of both, to tell whether two figures were measured on the same text.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str


def load_text() -> BuiltinText:
    """Read the interpreter's documentation topics and split them.

    Raises:
        InputError: This Python was installed without `pydoc_data`.
    """
    return split_topics(_read_topics())


def split_topics(topics: Mapping[str, str]) -> BuiltinText:
    """Split topics by name and keep every paragraph once, on one side only.

    Topics quote each other at length, so a split by topic alone would still leave much of the
    held-out text in the training text. A paragraph that stands on both sides is held out.
    """
    names = sorted(topics)
    held_out, seen = _keep_new_paragraphs((topics[n] for n in names if is_held_out(n)), set())
    train, _ = _keep_new_paragraphs((topics[n] for n in names if not is_held_out(n)), seen)
    return BuiltinText(train, held_out, text_hash(train, held_out))


def is_held_out(topic: str) -> bool:
    """Whether a topic is held out: a property of its name alone, in every Python version."""
    fraction = int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8]) / 2**64
    return fraction < HELD_OUT_SHARE


def paragraphs(text: str) -> list[str]:
    """The blocks of a text between blank lines, with their indentation."""
    blocks = (block.strip("\n").rstrip() for block in _BLANK_LINES.split(text))
    return [block for block in blocks if block]


def normalised(paragraph: str) -> str:
    """A paragraph as it is compared with others: without its line breaks and indentation."""
    return " ".join(paragraph.split())


def text_hash(*splits: tuple[str, ...]) -> str:
    """A hash of the documents, their order and their borders."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def standard_library_docstrings(held_out: Iterable[str]) -> tuple[str, ...]:
    """Docstrings of the standard library, one text per module, without held-out paragraphs.

    Only the teacher is trained on them: the topics alone are too little text for it. The source
    files are parsed, not imported, so nothing runs and modules for other platforms count too.

    Args:
        held_out: Texts whose paragraphs must not be learned.
    """
    seen = {normalised(block) for text in held_out for block in paragraphs(text)}
    root = Path(sysconfig.get_path("stdlib"))
    texts, _ = _keep_new_paragraphs(map(_docstrings, _source_files(root)), seen)
    return texts


def _read_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "This Python has no `pydoc_data`, which holds the built-in text: install the complete "
            "standard library, or name your own text with --data."
        ) from error
    return {str(name): text for name, text in topics.items() if isinstance(text, str)}


def _keep_new_paragraphs(texts: Iterable[str], seen: set[str]) -> tuple[tuple[str, ...], set[str]]:
    """Texts without the paragraphs already seen, and everything seen so far."""
    seen = set(seen)
    kept = []
    for text in texts:
        blocks = []
        for block in paragraphs(text):
            key = normalised(block)
            if key not in seen:
                seen.add(key)
                blocks.append(block)
        if blocks:
            kept.append("\n\n".join(blocks) + "\n")
    return tuple(kept), seen


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
            yield path


def _docstrings(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            # Old modules hold invalid escapes, which the parser warns about.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # Templates and deliberately broken files are part of some installations.
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))
    return "\n\n".join(doc for doc in found if doc)
