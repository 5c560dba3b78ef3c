"""Adds to datasets' fingerprints: hashes of a row's content and prompt, whatever its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kdrun.data.formats import ChatRow, Row, TextRow
from kdrun.data.messages import Message


def content_hash(row: Row) -> str:
    """Hash the content of a row, independent of its file, position and format."""
    return _hash(row.text if isinstance(row, TextRow) else _whole(row, row.messages))


def prompt_hash(row: Row) -> str:
    """Hash everything before a row's last answer, or all of a text."""
    return _hash(row.text if isinstance(row, TextRow) else _whole(row, row.messages[:-1]))


def _whole(row: ChatRow, messages: Sequence[Message]) -> list[Any]:
    return [*_contents(messages), *([list(row.tools)] if row.tools else [])]


def _contents(messages: Sequence[Message]) -> list[list[Any]]:
    return [[message.role, message.content, *_further(message)] for message in messages]


def _further(message: Message) -> list[Any]:
    """Return what few messages have, so that the hashes of others are those of earlier versions."""
    found = [message.reasoning, list(message.tool_calls), message.name, message.tool_call_id]
    return found if any(found) else []


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
