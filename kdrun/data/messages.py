"""Conversations: the messages of a row, and which of the assistant's answers are targets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.data.fields import BadRowError, Fields, kind_of
from kdrun.data.records import Position
from kdrun.errors import InputError

Role = Literal["system", "user", "assistant"]

MESSAGES_NAMES = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# A student without tools cannot learn from tool calls and results.
_UNUSABLE_ROLES = frozenset(
    {
        "developer",
        "environment",
        "function",
        "function_call",
        "function_response",
        "ipython",
        "observation",
        "tool",
        "tool_call",
        "tool_response",
        "tool_result",
    }
)
_CALL_NAMES = ("tool_calls", "function_call")
# Fields that mark targets in OpenAI's format and others, axolotl, ms-swift and verl.
_LEARNED_NAMES = ("weight", "train", "training", "trainable", "loss", "loss_mask")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: author of the message.
        content: text of the message.
        learned: for the assistant: whether the answer is a target or only context.
    """

    role: Role
    content: str
    learned: bool = True


def conversation(fields: Fields, field: str, position: Position) -> tuple[Message, ...]:
    """Return the messages in a field of a row, from the first question to the last answer.

    A system prompt in its own field comes first, unless the messages contain one.

    Raises:
        BadRowError: no answer, an empty message, no target, or a tool message.
        InputError: an unknown role.
    """
    turns = fields.get(field)
    if isinstance(turns, str) and turns.strip():
        raise BadRowError(f"has the messages in {field!r} as text, not as a list")
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"has no messages in {field!r}")
    messages = [_message(fields, turn, i, field, position) for i, turn in enumerate(turns, 1)]
    if not any(message.role == "system" and message.content for message in messages):
        messages = [
            *system_prompt(fields),
            *(m for m in messages if m.content or m.role != "system"),
        ]
    kept = _between_first_question_and_last_answer(messages, fields)
    for message in kept:
        if not message.content and message.role != "system":
            raise BadRowError(f"has an empty {message.role} message")
    return check_answers(tuple(m for m in kept if m.content))


def system_prompt(fields: Fields) -> list[Message]:
    """Return the system prompt in its own field, if any."""
    for name in SYSTEM_NAMES:
        if fields.has(name):
            return [Message("system", fields.optional_text(name))]
    return []


def history(fields: Fields) -> list[Message]:
    """Return earlier questions and answers: ``history``, a list of pairs.

    Raises:
        BadRowError: it has another form.
    """
    if not fields.has("history"):
        return []
    pairs = fields.get("history")
    messages: list[Message] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        whole = isinstance(pair, list) and len(pair) == 2
        if not whole or not all(isinstance(text, str) and text.strip() for text in pair):
            raise BadRowError("has a 'history' that is not a list of questions with their answers")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def check_answers(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages unchanged.

    Raises:
        BadRowError: there is no answer, or none is a target.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise BadRowError("has no assistant answer to a user message")
    if not any(answer.learned for answer in answers):
        raise BadRowError("has no answer to learn: all are marked as not to be learned")
    return messages


def _between_first_question_and_last_answer(
    messages: list[Message], fields: Fields
) -> list[Message]:
    """Drop answers without a question at the start, and questions without an answer at the end."""
    head = [m for m in messages[:1] if m.role == "system"]
    rest = messages[len(head) :]
    while rest and rest[0].role == "assistant":
        fields.leave_out("an answer before the first question")
        rest = rest[1:]
    if any(message.role == "assistant" for message in rest):
        while rest[-1].role != "assistant":
            fields.leave_out("a message after the last answer")
            rest = rest[:-1]
        return [*head, *rest]
    return head


def _message(fields: Fields, turn: object, number: int, field: str, position: Position) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"has {kind_of(turn)} as message {number}, not an object")
    inner = fields.inner(_joined_parts(turn), field)
    # Tables give every turn the fields of all turns, with null for absent ones.
    role_field = "from" if turn.get("role") is None and "from" in turn else "role"
    if role_field not in turn:
        raise BadRowError(f"has no role in message {number}")
    named = inner.get(role_field)
    given = str(named).strip().casefold()
    role = _ROLES.get(given)
    if role is None and given in _UNUSABLE_ROLES:
        raise BadRowError(f"has a message with the role {given!r}, which kdrun does not learn from")
    if role is None:
        close = difflib.get_close_matches(given, _ROLES, n=1)
        cure = f"did you mean {close[0]}?" if close else "use system, user or assistant"
        raise InputError(
            f"{position}: unknown role {named!r} in message {number}; {cure} (other names: human, "
            "gpt, chatgpt, bot, model)"
        )
    content_field = "value" if turn.get("content") is None and "value" in turn else "content"
    content = inner.optional_text(content_field)
    if not content and any(inner.has(name) for name in _CALL_NAMES):
        raise BadRowError("has a tool call, which kdrun does not learn from")
    return Message(role, content, _is_learned(inner, role, number))


def _is_learned(turn: Fields, role: Role, number: int) -> bool:
    """Return whether an answer is a target, which it is unless marked otherwise."""
    learned = True
    for name in _LEARNED_NAMES:
        if not turn.has(name):
            continue
        value = turn.get(name)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRowError(
                f"has {name} {value!r} in message {number}; an answer is learned (1, true) or not "
                "(0, false)"
            )
        if role == "assistant":
            learned = learned and bool(value)
        elif value:
            turn.leave_out(f"{name} of the {role}")
    return learned


def _joined_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Join content given as a list of text parts to one text."""
    joined = dict(turn)
    for field in ("content", "value"):
        parts = turn.get(field)
        if not isinstance(parts, list):
            continue
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise BadRowError("has a message with a part that is not text")
        joined[field] = "".join(str(text) for text in texts)
    return joined
