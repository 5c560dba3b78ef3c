"""Adds to datasets' features: rows, and which shape the records of a source have.

- ``text``: ``{"text": ...}``, or a document of a plain text file;
- ``prompt_response``: a prompt and a response with configurable or common names, each text or
  messages; several responses give several rows;
- ``alpaca``: ``instruction``, ``input`` (may be empty or absent), ``output``; also Self-Instruct's
  ``instruction`` with ``instances``, a list of inputs with their outputs;
- ``messages``: ``{"messages": [{"role": ..., "content": ...}]}``, or ShareGPT's
  ``{"conversations": [{"from": ..., "value": ...}]}``;
- ``preference``: a prompt with a ``chosen`` and a ``rejected`` answer;
- ``prompts``: prompts alone.

All but texts become conversations, after the row's system prompt (``system``, ``system_prompt``)
and with its ``tools``, so that everything after this module handles only texts and conversations.
Fields that no shape reads are reported (`kdrun.data.fields`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdrun.data import shapes
from kdrun.data.fields import BadRowError, Fields
from kdrun.data.messages import MESSAGES_NAMES, Message, as_prompt, complete
from kdrun.data.records import Position
from kdrun.data.teacher_prompt import STUDENTS_PROMPT, TeacherPrompt
from kdrun.data.tools import tools_of
from kdrun.errors import InputError

DataFormat = Literal[
    "auto", "text", "prompt_response", "alpaca", "messages", "preference", "prompts"
]

_PROMPT_NAMES = ("prompt", "question", "query", "problem", "instruction", "input", "source", "user")
# A solution leads to its answer, and often stands beside it.
_RESPONSE_NAMES = (
    "response",
    "generated_solution",
    "solution",
    "answer",
    "completion",
    "output",
    "target",
    "responses",
    "solutions",
    "answers",
    "completions",
    "outputs",
    "expected_answer",
    "assistant",
)
_CHOSEN, _REJECTED = "chosen", "rejected"
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
NO_ANSWERS = "prompts without answers, which the procedure writes"
_ALPACA_INPUT_NAMES = ("input", "context")
_ALPACA_OUTPUT_NAMES = ("output", "response")


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document; every token of it is a target."""

    text: str
    position: Position


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with an answer; only the assistant's answers are targets.

    Attributes:
        messages: the turns. The answer to a prompt alone has no words.
        position: where it comes from.
        tools: what the assistant may call, in the form that chat templates take.
        teacher: the turns that the teacher reads for the same answers; None if it reads these.
    """

    messages: tuple[Message, ...]
    position: Position
    tools: Sequence[dict[str, Any]] | None = None
    teacher: tuple[Message, ...] | None = None


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
    teacher: TeacherPrompt = STUDENTS_PROMPT,
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
        teacher: What the teacher reads.

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
    own = (("prompt_field", prompt_field), ("response_field", response_field))
    for key, field in (*own, *teacher.fields()):
        if field is not None and field not in keys:
            raise InputError(
                f"{source}: no row has the field {field!r} (data.{key}); {_found(keys)}"
                f"{_close_key(field, keys)}"
            )
    chosen = data_format
    if data_format == "auto":
        chosen = _detect(keys, any_text, prompt_field, response_field, source)
    if chosen == "prompts" and not prompts:
        raise unanswered(source, f" ({_found(keys)})")
    if chosen == "text":
        if not any_text and "text" not in keys:
            raise _unfit(source, chosen, "text", keys)
        if teacher.is_given:
            raise InputError(
                f"{source}: plain text has no prompt that could differ for the teacher; remove "
                "the keys data.teacher_..., or use rows with prompts and answers"
            )
        return chosen, _text_row
    shape = _shape(chosen, keys, prompt_field, response_field, source)
    return chosen, _chats(shape, prompts, teacher)


def unanswered(source: str, found: str = "") -> InputError:
    """Return the error for a source of prompts, where answers are needed."""
    return InputError(
        f"{source}: the rows have prompts but no answers{found}; name the answers with "
        "data.response_field, or use a procedure that writes every answer, such as gkd:lambda=1 "
        "or seqkd"
    )


def _detect(
    keys: Sequence[str],
    any_text: bool,
    prompt_field: str | None,
    response_field: str | None,
    source: str,
) -> DataFormat:
    if response_field is not None:
        return "prompt_response"
    if _CHOSEN in keys and _REJECTED in keys:
        return "preference"
    if prompt_field is not None:
        others = [name for name in keys if name != prompt_field]
        return "prompt_response" if _first(_RESPONSE_NAMES, others) else "prompts"
    if _first(MESSAGES_NAMES, keys):
        return "messages"
    if "instruction" in keys and (_first(_ALPACA_OUTPUT_NAMES, keys) or "instances" in keys):
        return "alpaca"
    if _first(_PROMPT_NAMES, keys) and _first(_RESPONSE_NAMES, keys):
        return "prompt_response"
    if any_text or "text" in keys:
        return "text"
    if _first(_PROMPT_NAMES, keys):
        return "prompts"
    raise _unrecognised(source, keys)


def _shape(
    data_format: DataFormat,
    keys: Sequence[str],
    prompt_field: str | None,
    response_field: str | None,
    source: str,
) -> shapes.Shape:
    talk = _first(MESSAGES_NAMES, keys)
    prompt = prompt_field or _first([n for n in _PROMPT_NAMES if n != response_field], keys)
    response = response_field or _first([n for n in _RESPONSE_NAMES if n != prompt], keys)
    extra = _first(_ALPACA_INPUT_NAMES, keys)
    if data_format == "messages":
        if talk is None:
            raise _unfit(source, data_format, "messages or conversations", keys)
        return shapes.conversation(talk)
    if data_format == "preference":
        if _CHOSEN not in keys:
            raise _unfit(source, data_format, "chosen and rejected", keys)
        return shapes.preference(prompt, talk)
    if data_format == "alpaca":
        output = _first(_ALPACA_OUTPUT_NAMES, keys)
        if "instruction" not in keys or (output is None and "instances" not in keys):
            raise _unfit(source, data_format, "instruction and output", keys)
        return shapes.instances if output is None else shapes.alpaca(extra, output)
    if data_format == "prompts":
        if prompt is None:
            raise _unfit(source, data_format, "a prompt", keys)
        return shapes.alpaca(extra, None) if prompt == "instruction" else shapes.prompt(prompt)
    if prompt is None or response is None:
        raise _unfit(source, data_format, "a prompt and a response", keys)
    return shapes.prompt_response(prompt, response)


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


def _chats(shape: shapes.Shape, prompts: bool, teacher: TeacherPrompt) -> Converter:
    """Return the converter to conversations.

    Args:
        shape: of the records.
        prompts: whether conversations that end with a question are rows, too.
        teacher: what the teacher reads.
    """

    def convert(fields: Fields, position: Position) -> list[Row]:
        for name in _MEDIA:
            if fields.has(name):
                raise BadRowError(f"has {name!r}, which kdrun does not learn from")
        tools = tools_of(fields)
        rows: list[Row] = []
        for messages in shape(fields, position):
            if prompts and messages[-1].role != "assistant":
                fields.say(NO_ANSWERS)
                own = as_prompt(fields, messages)
            else:
                own = complete(fields, messages)
            seen = teacher.conversation(fields, position, own)
            rows.append(ChatRow(own, position, tools, seen))
        return rows

    return convert
