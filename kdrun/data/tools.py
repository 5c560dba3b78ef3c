"""Adds to transformers' chat templates: tools and calls, however a row writes them.

Tables give every object the fields of all objects, with null for absent ones. Fields that are null
are therefore left out, except in arguments that are given as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kdrun.data.fields import BadRowError, Fields

_TOOLS_NAMES = ("tools", "functions")
_CALL_NAMES = ("tool_calls", "function_call")


def parse_json(text: str) -> Any:
    """Return the value of JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def tools_of(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the tools that a row offers.

    Raises:
        BadRowError: they have another form.
    """
    for name in _TOOLS_NAMES:
        if not fields.has(name):
            continue
        given = fields.get(name)
        if isinstance(given, str):
            given = parse_json(given)
        if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
            raise BadRowError(f"has {name!r} that are not a list of tools")
        tools: list[dict[str, Any]] = _without_null(given)
        return [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
        ]
    return None


def calls_of(turn: Fields, number: int) -> Sequence[dict[str, Any]]:
    """Return the tool calls of an answer.

    Args:
        turn: the message.
        number: its place in the conversation, for messages.

    Raises:
        BadRowError: one has no name.
    """
    for name in _CALL_NAMES:
        if turn.has(name):
            given = turn.get(name)
            return calls_in(parse_json(given) if isinstance(given, str) else given, number)
    return ()


def calls_in(given: Any, number: int) -> list[dict[str, Any]]:
    """Return one tool call or a list of them, each with its arguments as an object.

    Raises:
        BadRowError: one has no name.
    """
    return [_call(call, number) for call in (given if isinstance(given, list) else [given])]


def _call(given: Any, number: int) -> dict[str, Any]:
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRowError(f"has a tool call without a name in message {number}")
    arguments = _without_null(inner.get("arguments", inner.get("parameters")) or {})
    if isinstance(arguments, str):
        parsed = parse_json(arguments)
        arguments = parsed if isinstance(parsed, dict) else arguments
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    if isinstance(given.get("id"), str):
        call["id"] = given["id"]
    return call


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value
