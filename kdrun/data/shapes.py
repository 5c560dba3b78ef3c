"""Adds to datasets' columns: from the fields of a record to the messages of one or more rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kdrun.data.fields import BadRowError, Fields, kind_of
from kdrun.data.messages import Message, are_messages, history, read_messages, reasoning_of
from kdrun.data.records import Position

Shape = Callable[[Fields, Position], list[list[Message]]]
"""Returns the messages of each row of a record, without a system prompt beside them."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def conversation(field: str) -> Shape:
    """Read a list of messages."""
    return lambda fields, position: [read_messages(fields, field, position)]


def prompt(field: str) -> Shape:
    """Read a prompt alone."""
    return lambda fields, position: [_question(fields, field, position)]


def prompt_response(question: str, response: str) -> Shape:
    """Read a prompt and its response, each text or messages, or several responses."""

    def read(fields: Fields, position: Position) -> list[list[Message]]:
        # TRL's preferences without pairs mark each completion.
        marked = response == "completion" and isinstance(fields.peek("label"), bool)
        if marked and not fields.get("label"):
            raise BadRowError("has a completion that is marked as bad (label: false)")
        before = _question(fields, question, position)
        return [[*before, *answer] for answer in _answers(fields, response, position)]

    return read


def alpaca(extra: str | None, output: str | None) -> Shape:
    """Read an instruction, its input and its output; without an output it is a prompt."""

    def read(fields: Fields, position: Position) -> list[list[Message]]:
        question = _join(fields.text("instruction"), fields.optional_text(extra))
        before = [*history(fields), Message("user", question)]
        if output is None:
            return [before]
        return [[*before, *answer] for answer in _answers(fields, output, position)]

    return read


def instances(fields: Fields, position: Position) -> list[list[Message]]:
    """Read Self-Instruct's form: one instruction and a list of inputs with their outputs."""
    del position
    instruction, found = fields.text("instruction"), fields.get("instances")
    if not isinstance(found, list) or not found:
        raise BadRowError("has no list 'instances'")
    rows = []
    for instance in found:
        inner = fields.inner(instance, "instances")
        question = Message("user", _join(instruction, inner.optional_text("input")))
        rows.append([*history(fields), question, Message("assistant", inner.text("output"))])
    return rows


def preference(question: str | None, talk: str | None) -> Shape:
    """Read a chosen and a rejected answer, of which the chosen one is learned.

    Args:
        question: field of the prompt, if there is one.
        talk: field of messages, which may be the prompt.
    """

    def read(fields: Fields, position: Position) -> list[list[Message]]:
        rejected = fields.get("rejected")
        fields.say("preferences: 'chosen' is learned, 'rejected' is not")
        before = _before_choice(fields, question, talk, position)
        if are_messages(fields.peek("chosen")):
            return [_with_prompt(before, read_messages(fields, "chosen", position))]
        chosen = fields.text("chosen")
        if not before:
            return [_transcript(chosen)]
        asked = before[-1].content
        repeated = isinstance(rejected, str) and rejected.startswith(asked)
        if repeated and chosen.startswith(asked) and chosen[len(asked) :].strip():
            chosen = chosen[len(asked) :].lstrip()
        return [[*before, Message("assistant", chosen, reasoning=reasoning_of(fields))]]

    return read


def _before_choice(
    fields: Fields, question: str | None, talk: str | None, position: Position
) -> list[Message]:
    """Return the messages before both answers; none if the answers repeat them."""
    if talk is not None and fields.has(talk):
        messages = read_messages(fields, talk, position)
        # UltraFeedback has the chosen conversation there once more.
        if messages[-1].role != "assistant":
            return messages
    if question is not None and fields.has(question):
        return _question(fields, question, position)
    return []


def _with_prompt(before: Sequence[Message], chosen: list[Message]) -> list[Message]:
    """Return a conversation, of which the answer may repeat the prompt, or its last messages."""
    asked = [(m.role, m.content.strip()) for m in before]
    told = [(m.role, m.content.strip()) for m in chosen]
    for start in range(len(told) - len(asked) + 1):
        if told[start : start + len(asked)] == asked:
            return chosen
    most = min(len(asked), len(told))
    shared = max(n for n in range(most + 1) if asked[len(asked) - n :] == told[:n])
    return [*before, *chosen[shared:]]


def _transcript(text: str) -> list[Message]:
    """Read a conversation in one text, as Anthropic's preferences have it."""
    pieces = _TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise BadRowError("has an answer that was chosen, but no prompt")
    return [
        Message("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _question(fields: Fields, name: str, position: Position) -> list[Message]:
    if are_messages(fields.peek(name)):
        return read_messages(fields, name, position)
    return [*history(fields), Message("user", fields.text(name))]


def _answers(fields: Fields, name: str, position: Position) -> list[list[Message]]:
    """Return the answers in a field: text, messages, or a list of texts."""
    value = fields.peek(name)
    if are_messages(value):
        return [read_messages(fields, name, position)]
    if not isinstance(value, list):
        return [[Message("assistant", fields.text(name), reasoning=reasoning_of(fields))]]
    fields.get(name)
    for one in value:
        if not isinstance(one, str):
            raise BadRowError(f"has {kind_of(one)} in the list {name!r}, not text")
    texts = [text for text in dict.fromkeys(value) if text.strip()]
    if not texts:
        raise BadRowError(f"has the field {name!r} empty")
    if len(texts) > 1:
        fields.say(f"several answers in {name!r}, each of which is a row")
        return [[Message("assistant", text)] for text in texts]
    return [[Message("assistant", texts[0], reasoning=reasoning_of(fields))]]


def _join(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra else instruction
