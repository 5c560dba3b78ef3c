"""Adds to datasets' rows of messages: the conversation that the teacher reads for the same answer.

The answers of the row are the last answers of both conversations. What precedes them differs: a
whole prompt of another field, a template around the question, another system prompt, or messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdrun.data.fields import BadRowError, Fields
from kdrun.data.messages import INSTRUCTING, Message, are_messages, read_messages
from kdrun.data.records import Position
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.config.data_section import DataConfig

FIELD = "teacher_messages"
_PLACES = ("prompt", "context", "answer")
_PLACE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """How the teacher's conversation is made of a row's fields.

    Attributes:
        prompt_field: field with the whole prompt, text or messages, before the last answer.
        context_field: field with the text of ``{context}``.
        template: text instead of the question, with ``{prompt}``, ``{context}``, ``{answer}``.
        system: system prompt instead of the row's.
        last_only: whether the last answer alone is learned.
    """

    prompt_field: str | None = None
    context_field: str | None = None
    template: str | None = None
    system: str | None = None
    last_only: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> TeacherPrompt:
        """Return that of a run's rows.

        Raises:
            InputError: keys that exclude each other, or a template without effect.
        """
        problem = _problem_of(data.teacher_template, data.teacher_context_field)
        if problem is None and data.teacher_prompt_field and data.teacher_template:
            problem = (
                "data.teacher_prompt_field is the whole prompt, so data.teacher_template has no "
                "effect; remove one of them"
            )
        if problem is not None:
            raise InputError(problem)
        return cls(
            data.teacher_prompt_field,
            data.teacher_context_field,
            data.teacher_template,
            data.teacher_system,
            data.supervise == "last",
        )

    @property
    def is_given(self) -> bool:
        """Whether any of it is set; otherwise only the rows' own messages count."""
        return any((self.prompt_field, self.context_field, self.template, self.system))

    def fields(self) -> tuple[tuple[str, str | None], ...]:
        """Return the keys that name fields, with these names."""
        return (
            ("teacher_prompt_field", self.prompt_field),
            ("teacher_context_field", self.context_field),
        )

    def conversation(
        self, fields: Fields, position: Position, messages: tuple[Message, ...]
    ) -> tuple[Message, ...] | None:
        """Return what the teacher reads; None if it is what the student reads.

        Args:
            fields: of the record.
            position: of the record, for messages.
            messages: the student's conversation, which ends with an answer.

        Raises:
            BadRowError: the row lacks a text, or the teacher's messages lack one of its answers.
            InputError: the row has messages for the teacher, and a key sets its prompt as well.
        """
        if fields.has(FIELD):
            if any((self.prompt_field, self.template)):
                key = "teacher_template" if self.template else "teacher_prompt_field"
                raise InputError(f"{position}: the row has {FIELD!r}; remove data.{key}")
            fields.say(f"the teacher reads {FIELD!r}")
            given = read_messages(fields, FIELD, position)
            found = _answering(given, messages)
        elif self.prompt_field is not None:
            found = self._prompted(fields, position, messages)
        elif self.template is not None:
            found = self._filled(fields, messages)
        elif self.system is not None:
            found = messages
        else:
            return None
        return found if self.system is None else _instructed(found, self.system)

    def _prompted(
        self, fields: Fields, position: Position, messages: tuple[Message, ...]
    ) -> tuple[Message, ...]:
        name = str(self.prompt_field)
        if are_messages(fields.peek(name)):
            return _answering(read_messages(fields, name, position), messages)
        system = [message for message in messages[:2] if message.role in INSTRUCTING]
        return (*system, Message("user", fields.text(name)), messages[-1])

    def _filled(self, fields: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Put the template in place of the question of the first answer that is learned."""
        template = str(self.template)
        answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.learned]
        first = answers[-1 if self.last_only else 0]
        asked = next((i for i in range(first, -1, -1) if messages[i].role == "user"), None)
        if asked is None:
            raise BadRowError("has no question, which data.teacher_template goes around")
        texts = {"prompt": messages[asked].content}
        if self.context_field is not None:
            texts["context"] = fields.text(self.context_field)
        if "{answer}" in template:
            texts["answer"] = messages[-1].content
            if not texts["answer"]:
                raise BadRowError("has no answer for the {answer} of data.teacher_template")
        text = _PLACE.sub(lambda place: texts.get(place[1], place[0]), template)
        return (*messages[:asked], replace(messages[asked], content=text), *messages[asked + 1 :])


STUDENTS_PROMPT = TeacherPrompt()
"""The teacher reads what the student reads."""


def _problem_of(template: str | None, context_field: str | None) -> str | None:
    """Return what is wrong with a template; None if nothing is.

    Braces around other words are text, as in LaTeX, unless they look like a misspelt place.
    """
    if template is None:
        if context_field is None:
            return None
        return (
            "data.teacher_context_field has no effect without data.teacher_template, a text such "
            "as '{prompt} Here is a solution: {context}'"
        )
    found = [place[1] for place in _PLACE.finditer(template)]
    for name in found:
        close = difflib.get_close_matches(name, _PLACES, n=1, cutoff=0.75)
        if name not in _PLACES and close:
            return f"data.teacher_template: unknown {{{name}}}; did you mean {{{close[0]}}}?"
    if not {"prompt", "context", "answer"}.intersection(found):
        return "data.teacher_template: has none of {prompt}, {context} and {answer}"
    if "context" in found and context_field is None:
        return "data.teacher_template: {context} needs data.teacher_context_field"
    if "context" not in found and context_field is not None:
        return "data.teacher_template: has no {context} for data.teacher_context_field"
    if template.strip() == "{prompt}":
        return "data.teacher_template: '{prompt}' alone is what the student reads; remove it"
    return None


def _instructed(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """Return a conversation with another system prompt."""
    rest = [message for message in messages if message.role not in INSTRUCTING]
    return (Message("system", system), *rest)


def _answering(given: Sequence[Message], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the teacher's messages, in which the row's learned answers alone are learned.

    The last answer may be left out. Further answers, such as those of worked examples, precede
    those of the row.
    """
    if given[-1].role != "assistant":
        given = [*given, messages[-1]]
    places = [i for i, message in enumerate(given) if message.role == "assistant"]
    answers = [message for message in messages if message.role == "assistant"]
    learned: dict[int, bool] = {}
    for place, answer in zip(reversed(places), reversed(answers), strict=False):
        if _said(given[place]) != _said(answer):
            break
        learned[place] = answer.learned
    kept = len(learned)
    if any(answer.learned for answer in answers[: len(answers) - kept]):
        raise BadRowError(
            "has messages for the teacher in which an answer to learn is missing or differs"
        )
    return tuple(
        replace(message, learned=learned.get(i, False)) if message.role == "assistant" else message
        for i, message in enumerate(given)
    )


def _said(message: Message) -> tuple[object, ...]:
    return message.content, message.reasoning, list(message.tool_calls)
