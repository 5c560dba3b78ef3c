"""What a row is, and how a record of each data format becomes one.

- ``text``: ``{"text": ...}``, or a document of a plain text file;
- ``prompt_response``: a prompt and a response under configurable names, or the usual ones;
- ``alpaca``: ``instruction``, ``input`` (may be empty or absent), ``output``; also Self-Instruct's
  ``instruction`` with ``instances``, a list of inputs with their outputs;
- ``messages``: ``{"messages": [{"role": ..., "content": ...}]}``, or ShareGPT's
  ``{"conversations": [{"from": ..., "value": ...}]}``.

A prompt and its response are a conversation of two messages, so that everything after this module
knows only texts and conversations.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdrun.data.records import Position, Record
from kdrun.errors import InputError

DataFormat = Literal["auto", "text", "prompt_response", "alpaca", "messages"]
Role = Literal["system", "user", "assistant"]

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "source")
_RESPONSE_NAMES = ("response", "answer", "completion", "output", "target")
_ALPACA_INPUT_NAMES = ("input", "context")
_ALPACA_OUTPUT_NAMES = ("output", "response")
_MESSAGES_NAMES = ("messages", "conversations", "conversation")
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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document; every token of it is a target."""

    text: str
    position: Position


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with an answer; only the assistant's answers are targets."""

    messages: tuple[Message, ...]
    position: Position


Row = TextRow | ChatRow
Converter = Callable[[Record], list[Row]]


class BadRowError(Exception):
    """A single record cannot be used; the message is the reason, such as an empty field."""


def choose_converter(
    records: Sequence[Record],
    data_format: DataFormat,
    prompt_field: str | None,
    response_field: str | None,
    source: str,
) -> tuple[DataFormat, Converter]:
    """Decide how the records of one source are read.

    Args:
        records: All records of the source; the fields of all of them count, since a key may be
            missing in some rows.
        data_format: What the user asked for; ``auto`` decides by the names of the fields.
        prompt_field: The name of the prompt's field where it is not a usual one.
        response_field: The same for the response.
        source: The file or data set, for messages.

    Returns:
        The format, and the function that turns a record into rows or raises ``BadRowError``.

    Raises:
        InputError: No format fits the fields, or a field that the user named is in no row.
    """
    if data_format not in get_args(DataFormat):
        raise InputError(
            f"data.format={data_format}: must be one of {', '.join(get_args(DataFormat))}"
        )
    keys = list(dict.fromkeys(k for r in records if isinstance(r.value, dict) for k in r.value))
    any_text = any(isinstance(record.value, str) for record in records)
    for key, field in (("prompt_field", prompt_field), ("response_field", response_field)):
        if field is not None and field not in keys:
            raise InputError(
                f"{source}: no row has the field {field!r} (data.{key}); {_found(keys)}"
                f"{_close_key(field, keys)}"
            )
    chosen = data_format
    if data_format == "auto":
        named = prompt_field is not None or response_field is not None
        chosen = "prompt_response" if named else _detect(keys, any_text, source)
    return chosen, _converter(chosen, keys, any_text, prompt_field, response_field, source)


def _detect(keys: Sequence[str], any_text: bool, source: str) -> DataFormat:
    if _first(_MESSAGES_NAMES, keys):
        return "messages"
    if "instruction" in keys and (_first(_ALPACA_OUTPUT_NAMES, keys) or "instances" in keys):
        return "alpaca"
    if _first(_PROMPT_NAMES, keys) and _first(_RESPONSE_NAMES, keys):
        return "prompt_response"
    if any_text or "text" in keys:
        return "text"
    raise _unrecognised(source, keys)


def _converter(
    data_format: DataFormat,
    keys: Sequence[str],
    any_text: bool,
    prompt_field: str | None,
    response_field: str | None,
    source: str,
) -> Converter:
    if data_format == "text":
        if not any_text and "text" not in keys:
            raise _unfit(source, data_format, "text", keys)
        return _text_rows
    if data_format == "messages":
        field = _first(_MESSAGES_NAMES, keys)
        if field is None:
            raise _unfit(source, data_format, "messages or conversations", keys)
        return lambda record: [_conversation(record, field)]
    if data_format == "alpaca":
        output = _first(_ALPACA_OUTPUT_NAMES, keys)
        if "instruction" not in keys or (output is None and "instances" not in keys):
            raise _unfit(source, data_format, "instruction and output", keys)
        extra = _first(_ALPACA_INPUT_NAMES, keys)
        if output is None:
            return _instances
        return lambda record: [_alpaca(record, extra, output)]
    prompt = prompt_field or _first([n for n in _PROMPT_NAMES if n != response_field], keys)
    response = response_field or _first([n for n in _RESPONSE_NAMES if n != prompt], keys)
    if prompt is None or response is None:
        raise _unfit(source, data_format, "a prompt and a response", keys)
    return lambda record: [_prompt_response(record, prompt, response)]


def _first(names: Iterable[str], keys: Sequence[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def _found(keys: Sequence[str]) -> str:
    return f"the rows have {', '.join(keys)}" if keys else "the rows have no named fields"


def _close_key(field: str, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(field, keys, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unrecognised(source: str, keys: Sequence[str]) -> InputError:
    return InputError(
        f"{source}: no fields that kdrun knows: {_found(keys)}; name the fields with "
        "data.prompt_field and data.response_field, or use text, prompt and response, "
        "instruction and output, or messages"
    )


def _unfit(source: str, data_format: str, needed: str, keys: Sequence[str]) -> InputError:
    return InputError(f"{source}: data.format={data_format} needs {needed}, but {_found(keys)}")


def _fields(record: Record) -> dict[str, Any]:
    if not isinstance(record.value, dict):
        raise BadRowError(f"is {_kind(record.value)}, not an object with fields")
    return record.value


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", str: "text"}
    return "null" if value is None else names.get(type(value), "a number")


def _text_of(fields: dict[str, Any], name: str) -> str:
    """The text of a field that must not be empty."""
    if name not in fields:
        raise BadRowError(f"has no field {name!r}")
    text = _optional_text(fields, name)
    if not text:
        state = "set to null" if fields[name] is None else "empty"
        raise BadRowError(f"has the field {name!r} {state}")
    return text


def _optional_text(fields: dict[str, Any], name: str | None) -> str:
    """The text of a field, or an empty string where it is absent, null or blank."""
    value = fields.get(name) if name is not None else None
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRowError(f"has the field {name!r} as {_kind(value)}, not as text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRowError(f"has half of a character (a surrogate) in {name!r}") from error
    return value if value.strip() else ""


def _text_rows(record: Record) -> list[Row]:
    fields = {"text": record.value} if isinstance(record.value, str) else _fields(record)
    return [TextRow(_text_of(fields, "text"), record.position)]


def _ask(fields: dict[str, Any], prompt: str, answer: str, position: Position) -> ChatRow:
    """A conversation of one question, with the row's system message where it has one."""
    system = _optional_text(fields, "system")
    head = (Message("system", system),) if system else ()
    return ChatRow((*head, Message("user", prompt), Message("assistant", answer)), position)


def _prompt_response(record: Record, prompt: str, response: str) -> ChatRow:
    fields = _fields(record)
    question, answer = _text_of(fields, prompt), _text_of(fields, response)
    return _ask(fields, question, answer, record.position)


def _alpaca(record: Record, extra: str | None, output: str) -> ChatRow:
    fields = _fields(record)
    question = _join(_text_of(fields, "instruction"), _optional_text(fields, extra))
    return _ask(fields, question, _text_of(fields, output), record.position)


def _instances(record: Record) -> list[Row]:
    """Self-Instruct's form: one instruction and a list of inputs with their outputs."""
    fields = _fields(record)
    instruction, instances = _text_of(fields, "instruction"), fields.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRowError("has no list 'instances'")
    rows: list[Row] = []
    for instance in instances:
        inner = _fields(Record(instance, record.position))
        question = _join(instruction, _optional_text(inner, "input"))
        rows.append(_ask(fields, question, _text_of(inner, "output"), record.position))
    return rows


def _join(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra else instruction


def _conversation(record: Record, field: str) -> ChatRow:
    turns = _fields(record).get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"has no messages in {field!r}")
    messages = [_message(turn, number, record.position) for number, turn in enumerate(turns, 1)]
    kept = _between_first_question_and_last_answer(messages)
    if not any(message.role == "assistant" for message in kept):
        raise BadRowError("has no answer of the assistant to a message of the user")
    for message in kept:
        if not message.content and message.role != "system":
            raise BadRowError(f"has an empty message of the {message.role}")
    return ChatRow(tuple(m for m in kept if m.content), record.position)


def _between_first_question_and_last_answer(messages: list[Message]) -> list[Message]:
    """Leave out answers to nothing at the start, and questions without an answer at the end."""
    head = [m for m in messages[:1] if m.role == "system"]
    rest = messages[len(head) :]
    while rest and rest[0].role == "assistant":
        rest = rest[1:]
    while rest and rest[-1].role != "assistant":
        rest = rest[:-1]
    return [*head, *rest]


def _message(turn: object, number: int, position: Position) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"has {_kind(turn)} as message {number}, not an object")
    # Tables give every turn the fields of all turns, and null where one has none.
    role_field = "from" if turn.get("role") is None and "from" in turn else "role"
    if role_field not in turn:
        raise BadRowError(f"has no role in message {number}")
    role = _ROLES.get(str(turn[role_field]).strip().casefold())
    if role is None:
        raise InputError(
            f"{position}: unknown role {turn[role_field]!r} in message {number}; use system, user "
            "or assistant (or the names human, gpt, chatgpt, bot, model)"
        )
    content_field = "value" if turn.get("content") is None and "value" in turn else "content"
    return Message(role, _optional_text(_joined_parts(turn, content_field), content_field))


def _joined_parts(turn: dict[str, Any], field: str) -> dict[str, Any]:
    """Join content given as a list of parts, all of them text, to one text."""
    parts = turn.get(field)
    if not isinstance(parts, list):
        return turn
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRowError("has a message with a part that is not text")
    return {field: "".join(str(text) for text in texts)}
