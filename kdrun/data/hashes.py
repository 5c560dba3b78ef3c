"""Adds to datasets' fingerprints: hashes of a row's content and prompt, whatever its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from kdrun.data.formats import Row, TextRow
from kdrun.data.messages import Message


def content_hash(row: Row) -> str:
    """Hash the content of a row, independent of its file, position and format."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages))


def prompt_hash(row: Row) -> str:
    """Hash everything before a row's last answer, or all of a text."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages[:-1]))


def _contents(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
