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
from typing import Literal, get_args

from kdrun.data.fields import BadRowError, Fields
from kdrun.data.messages import (
    MESSAGES_NAMES,
    Message,
    conversation,
    history,
    system_prompt,
)
from kdrun.data.records import Position
from kdrun.errors import InputError

DataFormat = Literal["auto", "text", "prompt_response", "alpaca", "messages"]

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "source")
_RESPONSE_NAMES = ("response", "answer", "completion", "output", "target")
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


Row = TextRow | ChatRow
Converter = Callable[[Fields, Position], list[Row]]


def choose_converter(
    keys: Sequence[str],
    any_text: bool,
    data_format: DataFormat,
    prompt_field: str | None,
    response_field: str | None,
    source: str,
) -> tuple[DataFormat, Converter]:
    """Choose how the records of one source are read.

    Args:
        keys: the names of the fields of all records.
        any_text: whether any record is text, without fields.
        data_format: The configured format; ``auto`` detects it from the field names.
        prompt_field: The name of the prompt field, if it is not a common one.
        response_field: The same for the response.
        source: The file or data set, for messages.

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
    return chosen, _converter(chosen, keys, any_text, prompt_field, response_field, source)


def _detect(keys: Sequence[str], any_text: bool, source: str) -> DataFormat:
    if _first(MESSAGES_NAMES, keys):
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
        return _text_row
    if data_format == "messages":
        field = _first(MESSAGES_NAMES, keys)
        if field is None:
            raise _unfit(source, data_format, "messages or conversations", keys)
        return lambda fields, position: [ChatRow(conversation(fields, field, position), position)]
    if data_format == "alpaca":
        output = _first(_ALPACA_OUTPUT_NAMES, keys)
        if "instruction" not in keys or (output is None and "instances" not in keys):
            raise _unfit(source, data_format, "instruction and output", keys)
        extra = _first(_ALPACA_INPUT_NAMES, keys)
        if output is None:
            return _instances
        return lambda fields, position: _alpaca(fields, position, extra, output)
    prompt = prompt_field or _first([n for n in _PROMPT_NAMES if n != response_field], keys)
    response = response_field or _first([n for n in _RESPONSE_NAMES if n != prompt], keys)
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
    return [ChatRow((*messages, Message("assistant", answer)), position)]


def _prompt_response(fields: Fields, position: Position, prompt: str, response: str) -> list[Row]:
    return _ask(fields, fields.text(prompt), fields.text(response), position)


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
