"""Rows, and their conversion from records of each data format.

- ``text``: ``{"text": ...}``, or a document of a plain text file;
- ``prompt_response``: a prompt and a response with configurable or common names;
- ``alpaca``: ``instruction``, ``input`` (may be empty or absent), ``output``; also Self-Instruct's
  ``instruction`` with ``instances``, a list of inputs with their outputs;
- ``messages``: ``{"messages": [{"role": ..., "content": ...}]}``, or ShareGPT's
  ``{"conversations": [{"from": ..., "value": ...}]}``.

A prompt and its response form a conversation, after the row's system prompt (``system``,
``system_prompt``) and ``history``, so that everything after this module handles only texts and
conversations. Fields that no converter reads are reported (`kdrun.data.fields`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdrun.data.fields import BadRowError, Fields
from kdrun.data.messages import (
    MESSAGES_NAMES,
    Message,
    complete,
    conversation,
    history,
    read_messages,
    system_prompt,
    tools_of,
)
from kdrun.data.records import Position
from kdrun.errors import InputError

DataFormat = Literal[
    "auto", "text", "prompt_response", "alpaca", "messages", "preference", "prompts"
]

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "source", "problem")
_RESPONSE_NAMES = ("response", "answer", "completion", "output", "target", "solution", "answers")
_CHOSEN, _REJECTED = "chosen", "rejected"
_ALPACA_INPUT_NAMES = ("input", "context")
_ALPACA_OUTPUT_NAMES = ("output", "response")


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
    tools: Sequence[dict[str, Any]] | None = None


Row = TextRow | ChatRow
Converter = Callable[[Fields, Position], list[Row]]


def choose_converter(
    keys: Sequence[str],
    any_text: bool,
    data_format: DataFormat,
    prompt_field: str | None,
    response_field: str | None,
    source: str,
    prompts: bool = False,
) -> tuple[DataFormat, Converter]:
    """Choose how the records of one source are read.

    Args:
        keys: the names of the fields of all records.
        any_text: whether any record is text, without fields.
        data_format: The configured format; ``auto`` detects it from the field names.
        prompt_field: The name of the prompt field, if it is not a common one.
        response_field: The same for the response.
        source: The file or data set, for messages.
        prompts: Whether rows without answers will do.

    Returns:
        The format, and the function that converts the fields of a record to rows or raises
        ``BadRowError``.

    Raises:
        InputError: No format fits the fields, or no row has a configured field.
    """
    if data_format not in get_args(DataFormat):
        raise InputError(
            f"data.format={data_format}: must be one of {', '.join(get_args(DataFormat))}"
        )
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
    if chosen == "prompts" and not prompts:
        raise InputError(
            f"{source}: the rows have prompts but no answers ({_found(keys)}); name the answers "
            "with data.response_field, or use a procedure that writes every answer, such as "
            "gkd:lambda=1 or seqkd"
        )
    return chosen, _converter(chosen, keys, any_text, prompt_field, response_field, source)


def _detect(keys: Sequence[str], any_text: bool, source: str) -> DataFormat:
    if _first(MESSAGES_NAMES, keys):
        return "messages"
    if _CHOSEN in keys and _REJECTED in keys:
        return "preference"
    if "instruction" in keys and (_first(_ALPACA_OUTPUT_NAMES, keys) or "instances" in keys):
        return "alpaca"
    if _first(_PROMPT_NAMES, keys) and _first(_RESPONSE_NAMES, keys):
        return "prompt_response"
    if any_text or "text" in keys:
        return "text"
    if _first(_PROMPT_NAMES, keys):
        return "prompts"
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
        return _text_row
    if data_format == "messages":
        field = _first(MESSAGES_NAMES, keys)
        if field is None:
            raise _unfit(source, data_format, "messages or conversations", keys)
        return lambda fields, position: [
            ChatRow(conversation(fields, field, position), position, tools_of(fields))
        ]
    if data_format == "prompts":
        only = prompt_field or _first(_PROMPT_NAMES, keys)
        if only is None:
            raise _unfit(source, data_format, "a prompt", keys)
        return lambda fields, position: [_prompt_alone(fields, position, only)]
    if data_format == "preference":
        if _CHOSEN not in keys:
            raise _unfit(source, data_format, "chosen and rejected", keys)
        asked = prompt_field or _first(_PROMPT_NAMES, keys)
        return lambda fields, position: _preference(fields, position, asked)
    if data_format == "alpaca":
        output = _first(_ALPACA_OUTPUT_NAMES, keys)
        if "instruction" not in keys or (output is None and "instances" not in keys):
            raise _unfit(source, data_format, "instruction and output", keys)
        extra = _first(_ALPACA_INPUT_NAMES, keys)
        if output is None:
            return _instances
        return lambda fields, position: _alpaca(fields, position, extra, output)
    prompt = prompt_field or _first([n for n in _PROMPT_NAMES if n != response_field], keys)
    # A problem's solution leads to its answer.
    first = ("solution",) if prompt == "problem" else ()
    answers = [name for name in (*first, *_RESPONSE_NAMES) if name != prompt]
    response = response_field or _first(answers, keys)
    if prompt is None or response is None:
        raise _unfit(source, data_format, "a prompt and a response", keys)
    return lambda fields, position: _prompt_response(fields, position, prompt, response)


def _first(names: Iterable[str], keys: Sequence[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def _found(keys: Sequence[str]) -> str:
    return f"the rows have {', '.join(keys)}" if keys else "the rows have no named fields"


def _close_key(field: str, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(field, keys, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unrecognised(source: str, keys: Sequence[str]) -> InputError:
    return InputError(
        f"{source}: no fields known to kdrun: {_found(keys)}; name the fields with "
        "data.prompt_field and data.response_field, or use text, prompt and response, "
        "instruction and output, or messages"
    )


def _unfit(source: str, data_format: str, needed: str, keys: Sequence[str]) -> InputError:
    return InputError(f"{source}: data.format={data_format} needs {needed}, but {_found(keys)}")


def _text_row(fields: Fields, position: Position) -> list[Row]:
    return [TextRow(fields.text("text"), position)]


def _ask(fields: Fields, prompt: str, answer: str, position: Position) -> list[Row]:
    """Build a conversation with one question, after the row's system prompt and history."""
    messages = (*system_prompt(fields), *history(fields), Message("user", prompt))
    return [ChatRow((*messages, Message("assistant", answer)), position, tools_of(fields))]


def _prompt_response(fields: Fields, position: Position, prompt: str, response: str) -> list[Row]:
    """Read a prompt and its answer, each text or messages; several answers are several rows."""
    if isinstance(fields.peek(prompt), list) or _holds_messages(fields.peek(response)):
        return _talk(fields, position, prompt, response)
    answers = fields.peek(response)
    if isinstance(answers, list):
        fields.get(response)
        if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
            raise BadRowError(f"has {response!r} as a list that is not of texts")
        asked = fields.text(prompt)
        return [row for one in answers for row in _ask(fields, asked, one, position)]
    return _ask(fields, fields.text(prompt), fields.text(response), position)


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _talk(fields: Fields, position: Position, prompt: str, response: str) -> list[Row]:
    """Join a prompt and an answer, of which one is messages."""
    messages: list[Message] = []
    for name, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(fields.peek(name), list):
            messages += read_messages(fields, name, position)
        else:
            messages.append(Message(role, fields.text(name)))  # type: ignore[arg-type]
    return [ChatRow(complete(fields, messages), position, tools_of(fields))]


def _preference(fields: Fields, position: Position, prompt: str | None) -> list[Row]:
    """Learn from the answer that was preferred."""
    fields.get(_REJECTED)
    if prompt is not None and fields.has(prompt):
        chosen = fields.peek(_CHOSEN)
        repeats = _holds_messages(chosen) and len(chosen) > 1
        if not repeats:
            return _prompt_response(fields, position, prompt, _CHOSEN)
        fields.get(prompt)
    if not _holds_messages(fields.peek(_CHOSEN)):
        raise BadRowError("has an answer that was chosen, but no prompt")
    return [ChatRow(conversation(fields, _CHOSEN, position), position, tools_of(fields))]


def _prompt_alone(fields: Fields, position: Position, prompt: str) -> ChatRow:
    """Read a prompt that a model will answer; the answer in the row has no words."""
    messages = [*system_prompt(fields), *history(fields)]
    if isinstance(fields.peek(prompt), list):
        messages += read_messages(fields, prompt, position)
    else:
        messages.append(Message("user", fields.text(prompt)))
    if messages[-1].role == "assistant":
        raise BadRowError("has a prompt that ends with an answer")
    return ChatRow((*messages, Message("assistant", "")), position, tools_of(fields))


def _alpaca(fields: Fields, position: Position, extra: str | None, output: str) -> list[Row]:
    question = _join(fields.text("instruction"), fields.optional_text(extra))
    return _ask(fields, question, fields.text(output), position)


def _instances(fields: Fields, position: Position) -> list[Row]:
    """Read Self-Instruct's form: one instruction and a list of inputs with their outputs."""
    instruction, instances = fields.text("instruction"), fields.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRowError("has no list 'instances'")
    rows: list[Row] = []
    for instance in instances:
        inner = fields.inner(instance, "instances")
        question = _join(instruction, inner.optional_text("input"))
        rows += _ask(fields, question, inner.text("output"), position)
    return rows


def _join(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra else instruction
