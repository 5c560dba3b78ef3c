"""What goes into a chat template must come out: what it leaves out of a conversation.

Templates of reasoning models cut what stands before ``</think>``, some pass system messages over,
and some write nothing where they expect a list of parts. The models then learn something else than
stands in the rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdrun.data.fields import BadRowError
from kdrun.data.messages import Message

_WORD = re.compile(r"\w+")
_OF_ROLES = {"system": "the system message", "user": "a user message"}
_OF_LAST_ANSWER = "part of the answer"
_OF_EARLIER_ANSWERS = "part of an earlier answer"
CONSEQUENCES = {
    "the system message": "neither model reads it; use a template that writes it",
    "a user message": "neither model reads all of it; use a template that writes it",
    _OF_LAST_ANSWER: "the student does not learn it; use a template that writes whole answers",
    _OF_EARLIER_ANSWERS: "templates of reasoning models do so on purpose",
}
"""What follows from each kind of loss, for messages."""


@dataclass(frozen=True, slots=True)
class Place:
    """The rendered text in which a message has to stand.

    Attributes:
        own: of an answer its own turn; of another message what surrounds it.
        before: the text before it, since a prompt may end with the first words of an answer, such
            as an opening ``<think>``.
    """

    own: str
    before: str = ""


def find_lost(messages: Sequence[Message], places: Sequence[Place]) -> tuple[str, ...]:
    """The kinds of loss in a conversation, each once, as the keys of `CONSEQUENCES`.

    Args:
        messages: what went into the template.
        places: where each of them has to stand in what came out.

    Raises:
        BadRowError: nothing is left of an answer that is to be learned.
    """
    found = {}
    for turn, (message, place) in enumerate(zip(messages, places, strict=True)):
        if _stands(message.content, place):
            continue
        kind = _OF_ROLES.get(message.role)
        if kind is None:
            if message.learned and _nothing_left(message.content, place.own):
                raise BadRowError("has an answer that the chat template omits")
            kind = _OF_LAST_ANSWER if turn == len(messages) - 1 else _OF_EARLIER_ANSWERS
        found[kind] = True
    return tuple(found)


def places(
    messages: Sequence[Message], text: str, answers: Sequence[tuple[int, int]]
) -> list[Place]:
    """Where each message has to stand: a system message anywhere, others in their order.

    Args:
        messages: what went into the template.
        text: what came out.
        answers: where in it the turns of the assistant begin and end.
    """
    found, end, rest = [], 0, [*answers]
    for message in messages:
        start = rest[0][0] if rest else len(text)
        if message.role == "assistant":
            start, stop = rest.pop(0)
            found.append(Place(text[start:stop], text[end:start]))
            end = stop
        else:
            found.append(Place(text if message.role == "system" else text[end:start]))
    return found


def _stands(content: str, place: Place) -> bool:
    """Whether the words are there; templates may write other white space around and in them."""
    words = content.strip()
    if words in place.own or words in _with_head(place.own, place.before, len(words)):
        return True
    words = _squeeze(words)
    own, before = _squeeze(place.own), _squeeze(place.before)
    return words in own or words in _with_head(own, before, len(words))


def _with_head(own: str, before: str, length: int) -> str:
    """A text and what stands before it, as far as words of a length may begin there."""
    return before[max(0, len(before) - length + 1) :] + own


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _nothing_left(content: str, own: str) -> bool:
    return set(_WORD.findall(content)).isdisjoint(_WORD.findall(own))
