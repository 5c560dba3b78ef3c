"""Adds to transformers' chat templates: messages in the form that a template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdrun.data.messages import INSTRUCTING, REASONING_NAMES, Message

MARK = "\ue000"
"""A private use character, which no template writes or strips."""
# The prompt of some models ends with the opening tag, so that answers lack it.
_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<inner>(?:(?!</?think>).)*)</think>\s*", re.DOTALL)
_ASKED = Message("user", "a")
_CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "b", "arguments": {"k": MARK}},
}


@dataclass(frozen=True, slots=True)
class Form:
    """The form of messages that a chat template takes.

    Attributes:
        developer: whether it knows this role.
        reasoning: field in which it reads the reasoning of an answer, if any.
        writes_reasoning: whether it writes that of a plain answer.
        parts: whether it writes texts only if they are lists of parts, as some templates of vision
            models do: a plain text then renders to nothing.
        text_arguments: whether it writes the arguments of a call only if they are text.
    """

    developer: bool = False
    reasoning: str | None = None
    writes_reasoning: bool = False
    parts: bool = False
    text_arguments: bool = False


def form_of(template: str, write: Callable[[list[dict[str, Any]]], str]) -> Form:
    """Find out which form a chat template takes, by trying it.

    Args:
        template: the template.
        write: renders messages with it; nothing if the template rejects them.
    """
    form = Form(developer="developer" in template)
    if "text" in template:
        talk = (Message("user", MARK), Message("assistant", MARK))
        parts = replace(form, parts=True)
        texts = write(as_dicts(talk, form)).count(MARK)
        if texts < len(talk) <= write(as_dicts(talk, parts)).count(MARK):
            form = parts
    thinker = (_ASKED, Message("assistant", "b", reasoning=MARK))
    for name in (name for name in REASONING_NAMES if name in template):
        reads = replace(form, reasoning=name, writes_reasoning=True)
        if MARK in write(as_dicts(thinker, reads)):
            form = reads
            break
    else:
        if REASONING_NAMES[0] in template:  # which leaves it out of plain answers
            form = replace(form, reasoning=REASONING_NAMES[0])
    if "arguments" in template:
        caller = (_ASKED, Message("assistant", "", tool_calls=(_CALL,)))
        as_text = replace(form, text_arguments=True)
        if not _are_written(write(as_dicts(caller, form))) and _are_written(
            write(as_dicts(caller, as_text))
        ):
            form = as_text
    return form


def _are_written(text: str) -> bool:
    """Return whether the arguments are there, and not as Python shows them."""
    return MARK in text and "{'k'" not in text


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Return whether an answer has reasoning, in a field of its own or in its text."""
    return any(
        message.reasoning or _THOUGHT.match(message.content)
        for message in messages
        if message.role == "assistant"
    )


def split_thought(content: str) -> tuple[str, str]:
    """Return the reasoning at the beginning of an answer, and the rest."""
    found = _THOUGHT.match(content)
    return (found["inner"].strip(), content[found.end() :]) if found else ("", content)


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return messages without the reasoning of their answers."""
    return [
        replace(message, reasoning="", content=split_thought(message.content)[1])
        if has_reasoning([message])
        else message
        for message in messages
    ]


def as_dicts(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """Return messages in the form that a chat template takes.

    Reasoning is a field of its own where the template reads one, and otherwise stands at the
    beginning of the text, between the tags that reasoning models use. ``developer`` is ``system``
    where the template does not know the role, and joined to a system message before it.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        given = _as_dict(message, form)
        instructs = message.role in INSTRUCTING
        if instructs and not form.developer and found and found[-1]["role"] == "system":
            found[-1]["content"] += "\n\n" + given["content"]
        else:
            found.append(given)
    if form.parts:
        for given in found:
            given["content"] = [{"type": "text", "text": given["content"]}]
    return found


def _as_dict(message: Message, form: Form) -> dict[str, Any]:
    role = "system" if message.role == "developer" and not form.developer else message.role
    reasoning, content = message.reasoning, message.content
    if form.writes_reasoning and not reasoning and role == "assistant":
        reasoning, content = split_thought(content)
    given: dict[str, Any] = {"role": role, "content": content}
    if reasoning and form.reasoning is not None:
        given[form.reasoning] = reasoning
    elif reasoning:
        given["content"] = f"<think>\n{reasoning}\n</think>\n\n{content}"
    if message.tool_calls:
        given["tool_calls"] = [_as_call(call, form) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            given[name] = value
    return given


def _as_call(call: dict[str, Any], form: Form) -> dict[str, Any]:
    function = call["function"]
    if not form.text_arguments or isinstance(function["arguments"], str):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
