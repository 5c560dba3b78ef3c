"""Adds to transformers' chat templates: messages in the form that a template takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kdrun.data.messages import Message

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""Reasoning at the beginning of an answer."""
_REASONING = "reasoning_content"


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Return whether an answer has reasoning, in a field of its own or in its text."""
    return any(
        message.reasoning or THOUGHT.match(message.content)
        for message in messages
        if message.role == "assistant"
    )


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return messages without the reasoning of their answers."""
    return [
        replace(message, reasoning="", content=THOUGHT.sub("", message.content, count=1))
        if message.role == "assistant" and has_reasoning([message])
        else message
        for message in messages
    ]


def as_dicts(messages: Sequence[Message], template: str = "") -> list[dict[str, Any]]:
    """Return messages in the form that chat templates accept.

    Reasoning is a field of its own where the template reads one, and otherwise stands at the
    beginning of the text, between the tags that reasoning models use. ``developer`` is ``system``
    where the template does not know the role.

    Args:
        messages: a conversation.
        template: the chat template.
    """
    return [_as_dict(message, template) for message in messages]


def as_parts(messages: Sequence[Message], template: str = "") -> list[dict[str, Any]]:
    """Return messages whose texts are lists of a part, as templates of vision models read them."""
    found = as_dicts(messages, template)
    for given in found:
        given["content"] = [{"type": "text", "text": given["content"]}]
    return found


def _as_dict(message: Message, template: str) -> dict[str, Any]:
    role, content = message.role, message.content
    if role == "developer" and "developer" not in template:
        role = "system"
    given: dict[str, Any] = {"role": role, "content": content}
    if message.reasoning:
        if _REASONING in template:
            given[_REASONING] = message.reasoning
        else:
            given["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{content}"
    if message.tool_calls:
        given["tool_calls"] = list(message.tool_calls)
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            given[name] = value
    return given
