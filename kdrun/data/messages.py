"""Adds to datasets' rows of messages: which of the assistant's answers are targets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.data.fields import BadRowError, Fields, kind_of
from kdrun.data.records import Position
from kdrun.data.tools import calls_in, calls_of, parse_json
from kdrun.errors import InputError

Role = Literal["system", "developer", "user", "assistant", "tool"]

MESSAGES_NAMES = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
INSTRUCTING = ("system", "developer")
NO_ANSWER = "has no assistant answer to a user message"
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "observation": "tool",
    "environment": "tool",
    "ipython": "tool",
}
_CALLING_ROLES = ("function_call", "tool_call")
"""Roles of messages whose content is a tool call of the assistant, as JSON."""
_UNUSABLE_ROLES = ("image", "audio", "video")
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
# Fields that mark targets in OpenAI's format and others, axolotl, ms-swift and verl.
_LEARNED_NAMES = ("weight", "train", "training", "trainable", "loss", "loss_mask")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: author of the message.
        content: text of the message.
        learned: for the assistant: whether the answer is a target or only context.
        reasoning: for the assistant: what it thought before it answered.
        tool_calls: for the assistant: calls as chat templates take them.
        name: of the tool whose result this is.
        tool_call_id: of the call whose result this is.
    """

    role: Role
    content: str
    learned: bool = True
    reasoning: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()
    name: str = ""
    tool_call_id: str = ""

    @property
    def says_something(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.content or self.tool_calls or self.reasoning)


def read_messages(fields: Fields, field: str, position: Position) -> list[Message]:
    """Return all messages in a field of a row, a list or JSON text of one.

    Raises:
        BadRowError: it is no list of messages.
        InputError: an unknown role.
    """
    turns = _turns_in(fields.get(field))
    if isinstance(turns, str) and turns.strip():
        raise BadRowError(f"has the messages in {field!r} as text that is not a JSON list")
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"has no messages in {field!r}")
    return [_message(fields, turn, i, field, position) for i, turn in enumerate(turns, 1)]


def complete(fields: Fields, messages: list[Message]) -> tuple[Message, ...]:
    """Return a conversation from the first question to the last answer, with its system prompt.

    Raises:
        BadRowError: no answer, an empty message, or no target.
    """
    kept = _between_first_question_and_last_answer(_with_system_prompt(fields, messages), fields)
    _check_words(kept)
    return check_answers(tuple(kept))


def as_prompt(fields: Fields, messages: list[Message]) -> tuple[Message, ...]:
    """Return a conversation that a model will answer; the answer in the row has no words.

    Raises:
        BadRowError: a message is empty, or there is no question.
    """
    kept = _with_system_prompt(fields, messages)
    head = [m for m in kept[:2] if m.role in INSTRUCTING]
    if len(kept) == len(head):
        raise BadRowError("has no question")
    _check_words(kept)
    return (*kept, Message("assistant", ""))


def are_messages(value: Any) -> bool:
    """Return whether a value contains messages rather than text or texts."""
    turns = _turns_in(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _turns_in(value: Any) -> Any:
    """Return the list in a value that is a list of messages, one message, or JSON of these."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        parsed = parse_json(value)
        value = parsed if isinstance(parsed, list | dict) else value
    return [value] if isinstance(value, dict) else value


def reasoning_of(fields: Fields) -> str:
    """Return the reasoning in a field of its own, if any."""
    for name in REASONING_NAMES:
        if fields.has(name) and isinstance(fields.peek(name), str):
            return fields.optional_text(name)
    return ""


def _with_system_prompt(fields: Fields, messages: list[Message]) -> list[Message]:
    """Return messages after the row's system prompt, unless they have one with words."""
    if not any(message.role in INSTRUCTING and message.content for message in messages):
        messages = [*_system_prompt(fields), *messages]
    return [m for m in messages if m.content or m.role not in INSTRUCTING]


def _check_words(messages: list[Message]) -> None:
    for message in messages:
        if not message.says_something and message.role != "tool":
            raise BadRowError(f"has an empty {message.role} message")


def _system_prompt(fields: Fields) -> list[Message]:
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
        raise BadRowError(NO_ANSWER)
    if not any(answer.learned for answer in answers):
        raise BadRowError("has no answer to learn: all are marked as not to be learned")
    return messages


def _between_first_question_and_last_answer(
    messages: list[Message], fields: Fields
) -> list[Message]:
    """Drop answers without a question at the start, and questions without an answer at the end."""
    head = [m for m in messages[:2] if m.role in INSTRUCTING]
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
    if given in _UNUSABLE_ROLES:
        raise BadRowError(f"has a message with the role {given!r}, which kdrun does not learn from")
    if given in _CALLING_ROLES:
        return _calling(inner, turn, number)
    role = _ROLES.get(given)
    if role is None:
        close = difflib.get_close_matches(given, _ROLES, n=1)
        cure = f"did you mean {close[0]}?" if close else "use system, user, assistant or tool"
        raise InputError(
            f"{position}: unknown role {named!r} in message {number}; {cure} (other names: human, "
            "gpt, chatgpt, bot, model)"
        )
    content = inner.optional_text(_content_field(turn))
    learned = _is_learned(inner, role, number)
    if role == "assistant":
        reasoning = reasoning_of(inner) or _thoughts_in(turn)
        return Message(role, content, learned, reasoning, calls_of(inner, number))
    if role == "tool":
        named_by = (inner.optional_text("name"), inner.optional_text("tool_call_id"))
        return Message(role, content, learned, "", (), *named_by)
    return Message(role, content, learned)


def _content_field(turn: dict[str, Any]) -> str:
    return "value" if turn.get("content") is None and "value" in turn else "content"


def _calling(turn: Fields, given: dict[str, Any], number: int) -> Message:
    """Return an answer whose content is one tool call or a list of them, as JSON."""
    found = parse_json(turn.optional_text(_content_field(given)))
    learned = _is_learned(turn, "assistant", number)
    return Message("assistant", "", learned, "", calls_in(found, number))


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


def _are_parts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and "type" in part for part in value
    )


def _joined_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Join content given as a list of text parts to one text."""
    joined = dict(turn)
    of_tool = _ROLES.get(str(turn.get("role") or turn.get("from")).strip().casefold()) == "tool"
    for field in ("content", "value"):
        parts = turn.get(field)
        if of_tool and isinstance(parts, dict | list) and not _are_parts(parts):
            joined[field] = json.dumps(parts, ensure_ascii=False, default=str)
            continue
        if not isinstance(parts, list):
            continue
        parts = [part for part in parts if not _is_thought(part)]
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else None
                what = f"of the type {kind!r}" if isinstance(kind, str) else "that is not text"
                raise BadRowError(f"has a message with a part {what}")
        joined[field] = "".join(part["text"] for part in parts)
    return joined


def _is_thought(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("thinking"), str)


def _thoughts_in(turn: dict[str, Any]) -> str:
    """Return the reasoning among the parts of an answer."""
    parts = turn.get("content")
    return (
        "".join(p["thinking"] for p in parts if _is_thought(p)) if isinstance(parts, list) else ""
    )
