"""Conversations: the messages of a row, and which of the assistant's answers are targets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.data.fields import BadRowError, Fields, kind_of
from kdrun.data.records import Position
from kdrun.errors import InputError

Role = Literal["system", "developer", "user", "assistant", "tool"]

MESSAGES_NAMES = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
TOOLS_NAMES = ("tools", "functions")
INSTRUCTING = ("system", "developer")
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
_CALL_NAMES = ("tool_calls", "function_call")
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


def conversation(fields: Fields, field: str, position: Position) -> tuple[Message, ...]:
    """Return the messages in a field of a row, from the first question to the last answer.

    A system prompt in its own field comes first, unless the messages contain one.

    Raises:
        BadRowError: no answer, an empty message, no target, or a tool message.
        InputError: an unknown role.
    """
    return complete(fields, read_messages(fields, field, position))


def read_messages(fields: Fields, field: str, position: Position) -> list[Message]:
    """Return all messages in a field of a row, a list or JSON text of one.

    Raises:
        BadRowError: it is no list of messages.
        InputError: an unknown role.
    """
    turns = fields.get(field)
    if isinstance(turns, str) and turns.strip():
        turns = parse_json(turns)
        if not isinstance(turns, list):
            raise BadRowError(f"has the messages in {field!r} as text that is not a JSON list")
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"has no messages in {field!r}")
    return [_message(fields, turn, i, field, position) for i, turn in enumerate(turns, 1)]


def complete(fields: Fields, messages: list[Message]) -> tuple[Message, ...]:
    """Return a conversation from the first question to the last answer, with its system prompt.

    Raises:
        BadRowError: no answer, an empty message, or no target.
    """
    if not any(message.role in INSTRUCTING and message.content for message in messages):
        messages = [
            *system_prompt(fields),
            *(m for m in messages if m.content or m.role not in INSTRUCTING),
        ]
    kept = _between_first_question_and_last_answer(messages, fields)
    for message in kept:
        if not message.says_something and message.role not in (*INSTRUCTING, "tool"):
            raise BadRowError(f"has an empty {message.role} message")
    return check_answers(tuple(m for m in kept if m.says_something or m.role == "tool"))


def parse_json(text: str) -> Any:
    """Return the value of JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def tools_of(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the tools that a row offers, in the form that chat templates take.

    Raises:
        BadRowError: they have another form.
    """
    for name in TOOLS_NAMES:
        if not fields.has(name):
            continue
        given = fields.get(name)
        if isinstance(given, str):
            given = parse_json(given)
        if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
            raise BadRowError(f"has {name!r} that are not a list of tools")
        return [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in given
        ]
    return None


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
    head = [m for m in messages[:1] if m.role in INSTRUCTING]
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
        cure = f"did you mean {close[0]}?" if close else "use system, user or assistant"
        raise InputError(
            f"{position}: unknown role {named!r} in message {number}; {cure} (other names: human, "
            "gpt, chatgpt, bot, model)"
        )
    content = inner.optional_text(_content_field(turn))
    learned = _is_learned(inner, role, number)
    if role == "assistant":
        reasoning = next((inner.optional_text(n) for n in REASONING_NAMES if inner.has(n)), "")
        return Message(role, content, learned, reasoning, _calls(inner, number))
    if role == "tool":
        named_by = (inner.optional_text("name"), inner.optional_text("tool_call_id"))
        return Message(role, content, learned, "", (), *named_by)
    return Message(role, content, learned)


def _content_field(turn: dict[str, Any]) -> str:
    return "value" if turn.get("content") is None and "value" in turn else "content"


def _calling(turn: Fields, given: dict[str, Any], number: int) -> Message:
    """Return an answer whose content is one tool call or a list of them, as JSON."""
    found = parse_json(turn.optional_text(_content_field(given)))
    calls = found if isinstance(found, list) else [found]
    return Message("assistant", "", True, "", [_call(call, number) for call in calls])


def _calls(turn: Fields, number: int) -> Sequence[dict[str, Any]]:
    """Return the tool calls of an answer."""
    for name in _CALL_NAMES:
        if turn.has(name):
            given = turn.get(name)
            if isinstance(given, str):
                given = parse_json(given)
            calls = given if isinstance(given, list) else [given]
            return [_call(call, number) for call in calls]
    return ()


def _call(given: Any, number: int) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as chat templates take it."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRowError(f"has a tool call without a name in message {number}")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        parsed = parse_json(arguments)
        arguments = parsed if isinstance(parsed, dict) else arguments
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    if isinstance(given, dict) and isinstance(given.get("id"), str):
        call["id"] = given["id"]
    return call


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
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise BadRowError("has a message with a part that is not text")
        joined[field] = "".join(str(text) for text in texts)
    return joined
