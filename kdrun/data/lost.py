"""Adds to transformers' chat templates: which parts of a conversation one leaves out.

Templates of reasoning models cut text before ``</think>``, some ignore system messages, and some
write nothing if they expect a list of parts. The student then learns from different text than the
rows contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdrun.data.fields import BadRowError
from kdrun.data.given import split_thought
from kdrun.data.messages import INSTRUCTING, Message

_WORD = re.compile(r"\w+")
_OF_ROLES = {
    "system": "the system message",
    "developer": "the system message",
    "user": "a user message",
    "tool": "a tool result",
}
_REASONING, _CALL, _TOOLS = "the reasoning of an answer", "a tool call", "the tools"
_OF_LAST_ANSWER = "part of the answer"
_OF_EARLIER_ANSWERS = "part of an earlier answer"
CONSEQUENCES = {
    "the system message": "neither model reads it; use a template that writes it",
    "a user message": "neither model reads all of it; use a template that writes it",
    "a tool result": "neither model reads it; use a template that writes results of tools",
    _REASONING: "the student does not learn it; use a template that writes it, or "
    "data.reasoning=drop",
    _CALL: "the student does not learn it; use a template that writes tool calls",
    _TOOLS: "neither model reads them; use a template that writes them",
    _OF_LAST_ANSWER: "the student does not learn it; use a template that writes whole answers",
    _OF_EARLIER_ANSWERS: "templates of reasoning models do so on purpose",
}
"""Consequence of each kind of loss, for messages."""


@dataclass(frozen=True, slots=True)
class Place:
    """The rendered text in which a message must appear.

    Attributes:
        own: the turn of an answer; for another message, the text around it.
        before: the text before it, since a prompt may end with the beginning of an answer, such
            as an opening ``<think>``.
    """

    own: str
    before: str = ""


def find_lost(messages: Sequence[Message], places: Sequence[Place]) -> tuple[str, ...]:
    """Return the kinds of loss in a conversation, each once, as keys of `CONSEQUENCES`.

    Args:
        messages: the template's input.
        places: where each of them must appear in the output.

    Raises:
        BadRowError: an answer that is a target is omitted completely, or contains a tool result.
    """
    found = {}
    both = list(zip(messages, places, strict=True))
    answers = [place for message, place in both if message.role == "assistant"]
    for number, (message, place) in enumerate(both, start=1):
        if message.reasoning and not _stands(message.reasoning, place):
            # Templates of reasoning models leave out that of earlier answers on purpose.
            last = number == len(messages)
            found[_REASONING if last else _OF_EARLIER_ANSWERS] = True
        said = [str(call["function"]["name"]) in place.own for call in message.tool_calls]
        if not all(said):
            found[_CALL] = True
        if _stands(message.content, place) or _stands_in_parts(message.content, place.own):
            continue
        if message.role == "tool":
            if _stands(_escaped(message.content), place):
                continue
            if any(message.content in answer.own for answer in answers):
                raise BadRowError("has a tool result that the chat template writes in an answer")
        kind = _OF_ROLES.get(message.role)
        if kind is None:
            if message.learned and not any(said) and _nothing_left(message.content, place.own):
                raise BadRowError("has an answer that the chat template omits")
            kind = _OF_LAST_ANSWER if number == len(messages) else _OF_EARLIER_ANSWERS
        found[kind] = True
    return tuple(found)


def unsaid_calls(messages: Sequence[Message], places: Sequence[Place]) -> frozenset[int]:
    """Return which answers are tool calls alone that the template omits, counted by answers.

    Such an answer would be learned as one of no words.
    """
    answers = [both for both in zip(messages, places, strict=True) if both[0].role == "assistant"]
    return frozenset(
        number
        for number, (message, place) in enumerate(answers)
        if message.tool_calls
        and not message.content.strip()
        and not any(str(call["function"]["name"]) in place.own for call in message.tool_calls)
    )


def lost_tools(tools: Sequence[dict[str, Any]], text: str, without: str) -> tuple[str, ...]:
    """Return the kind of loss if tools are not written, as a key of `CONSEQUENCES`.

    Args:
        tools: what the assistant may call.
        text: the template's output.
        without: its output without them; calls may name them, too.
    """
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
    return () if text != without and all(name in text for name in names) else (_TOOLS,)


def places(
    messages: Sequence[Message], text: str, answers: Sequence[tuple[int, int]]
) -> list[Place]:
    """Return where each message must appear: a system message anywhere, others in order.

    Args:
        messages: the template's input.
        text: the template's output.
        answers: where the assistant turns begin and end in it.
    """
    found, end, rest = [], 0, [*answers]
    for message in messages:
        start = rest[0][0] if rest else len(text)
        if message.role == "assistant":
            start, stop = rest.pop(0)
            found.append(Place(text[start:stop], text[end:start]))
            end = stop
        else:
            found.append(Place(text if message.role in INSTRUCTING else text[end:start]))
    return found


def _stands(content: str, place: Place) -> bool:
    """Return whether the words are present; templates may change white space around and in them."""
    words = content.strip()
    if words in place.own or words in _with_head(place.own, place.before, len(words)):
        return True
    words = _squeeze(words)
    own, before = _squeeze(place.own), _squeeze(place.before)
    return words in own or words in _with_head(own, before, len(words))


def _stands_in_parts(content: str, own: str) -> bool:
    """Return whether an answer follows its reasoning, however the template marks that."""
    thought, rest = split_thought(content)
    if not thought or not rest.strip():
        return False
    before, found, _ = _squeeze(own).rpartition(_squeeze(rest))
    return bool(found) and _squeeze(thought) in before


def _escaped(content: str) -> str:
    """Return a text as JSON holds it, which is how some templates write results of tools."""
    return json.dumps(content.strip(), ensure_ascii=False)[1:-1]


def _with_head(own: str, before: str, length: int) -> str:
    """Return a text and as much text before it as words of a given length may need."""
    return before[max(0, len(before) - length + 1) :] + own


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _nothing_left(content: str, own: str) -> bool:
    return set(_WORD.findall(content)).isdisjoint(_WORD.findall(own))
