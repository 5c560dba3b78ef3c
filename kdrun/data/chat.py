"""Conversations as text, and where in that text the assistant's answers stand.

The tokenizer's chat template renders a conversation. A tokenizer without one gets `PLAIN_TEMPLATE`:
every message of the system or the user is followed by a line break, every answer by the
end-of-text token. A question and its answer are then ``question\\nanswer<eos>``.

A template does not say where an answer begins. It is found by rendering twice: the messages before
the answer with the prompt for a generation are what the model is given, so what follows them in the
whole conversation is what it has to say. It ends where the same messages, rendered alone, end; a
template that writes the last answer otherwise is rendered with a mark behind the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from kdrun.data.fields import BadRowError
from kdrun.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.sections import DataConfig

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}"
    "{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


_JOINED_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")
_MARK = "\ue000"
"""A character of the private use areas, which no template writes or strips."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """The characters of one turn of the assistant: the answer and what the template ends it with.

    Attributes:
        start: The first character after the prompt for the answer.
        end: The end of the turn, white space after it included.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the template writes it, and the turns of the assistant in it."""

    text: str
    answers: tuple[AnswerSpan, ...]


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the text of a conversation follows from besides the tokenizer's template.

    Attributes:
        date: The day, in ISO form, that templates write which write one; None is today.
        rendered: Whether messages are rendered already and only joined.
    """

    date: str | None = None
    rendered: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> Rendering:
        """The rendering of a run's rows."""
        return cls(data.date, data.rendered)

    def dated(self, template: str) -> str:
        """A chat template that writes :attr:`date` where it asks for the present day.

        transformers gives every template a clock, ``strftime_now``, which those of Llama 3 and
        others ask: the rows of a run would differ from those of the day before.
        """
        if self.date is None:
            return template
        noon = datetime.fromisoformat(f"{self.date}T12:00:00")
        return _CLOCK.sub(lambda call: json.dumps(noon.strftime(call["form"])), template)


USUAL_RENDERING = Rendering()


class HiddenAnswersError(Exception):
    """The template gives no way to tell the answers from the rest of the conversation."""


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or else with `PLAIN_TEMPLATE`.

    Args:
        tokenizer: The tokenizer that both models use.
        rendering: What the text follows from besides the template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = USUAL_RENDERING
    ) -> None:
        """Take the tokenizer's template."""
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer, rendering)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(special_tokens(self._tokenizer))

    def render(self, messages: Sequence[Message], *, for_generation: bool = False) -> str:
        """The conversation as text, special tokens included: tokenise it without adding any.

        Args:
            messages: The conversation.
            for_generation: End with the template's prompt for the assistant's next answer.

        Raises:
            BadRowError: The template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            rendered: str = self._tokenizer.apply_chat_template(
                as_dicts(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=for_generation,
            )
        except TemplateError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadRowError(f"is refused by the chat template ({reason})") from error
        return rendered

    def render_with_answers(self, messages: Sequence[Message]) -> RenderedChat:
        """Render a conversation that ends with an answer, and find its answers.

        Raises:
            BadRowError: The template refuses the conversation.
            HiddenAnswersError: The template writes a message otherwise when others follow it, and
                so that the end of an answer cannot be told.
        """
        text = self.render(messages)
        answers = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._start_of_answer(messages[:turn], text)
            through = text if turn == len(messages) - 1 else self.render(messages[: turn + 1])
            if text.startswith(through):
                end = len(through)
            else:
                end = self._end_of_answer(messages, turn, text, through)
            if end < start:
                raise HiddenAnswersError
            answers.append(AnswerSpan(start, end))
        return RenderedChat(text, tuple(answers))

    def _end_of_answer(
        self, messages: Sequence[Message], turn: int, text: str, through: str
    ) -> int:
        """The end of a turn in the middle that differs from the same turn at the end.

        Qwen3's template drops the reasoning from all answers but the last, and ends both alike;
        that of gpt-oss ends the last one alone with ``<|return|>`` and others with ``<|end|>``.
        """
        rest = text[self._end_of_content(messages, turn, text) :]
        ending = through[self._end_of_content(messages[: turn + 1], turn, through) :]
        if not ending.strip() or not rest.startswith(ending):
            rest = rest.lstrip()
            ending = max((t for t in self._special if rest.startswith(t)), key=len, default="")
            if not ending:
                raise HiddenAnswersError
        # With the white space behind it, which some special tokens swallow.
        return len(text) - len(rest[len(ending) :].lstrip())

    def _end_of_content(self, messages: Sequence[Message], turn: int, text: str) -> int:
        """Where the words of an answer end in a rendered conversation."""
        message = messages[turn]
        marked = Message(message.role, message.content + _MARK)
        other = self.render([*messages[:turn], marked, *messages[turn + 1 :]])
        end = _shared_length(text, other)
        if not other.endswith(text[end:]):
            raise HiddenAnswersError
        return end

    def _start_of_answer(self, before: Sequence[Message], text: str) -> int:
        prompt = self.render(before, for_generation=True)
        if text.startswith(prompt):
            return len(prompt)
        # Templates of reasoning models end the prompt with an opening <think> that a given answer
        # need not have: what both share beyond the earlier messages is the head of the turn.
        if text.startswith(self.render(before)):
            return _shared_length(text, prompt)
        raise HiddenAnswersError


def template_of(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> str:
    """The template that conversations are rendered with."""
    if rendering.rendered:
        return _JOINED_TEMPLATE
    if not tokenizer.chat_template:
        return _plain_template(tokenizer)
    return rendering.dated(tokenizer.get_chat_template())


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the present day."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that no text stands for, such as the end of a turn."""
    added = tokenizer.added_tokens_decoder
    found = {token.content: number for number, token in added.items() if token.special}
    own = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | dict(own)


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages in the form that chat templates read."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _shared_length(left: str, right: str) -> int:
    differ = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differ, min(len(left), len(right)))


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`PLAIN_TEMPLATE`, after a begin-of-text token where the tokenizer puts one before texts."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
