"""Adds to transformers' chat templates: the text of a conversation, and where its answers stand.

The tokenizer's chat template renders a conversation. Without one, `PLAIN_TEMPLATE` is used:
every system or user message is followed by a line break, every answer by the end-of-text token.
A question and its answer are then ``question\\nanswer<eos>``.

A template does not say where an answer begins. It is found by rendering twice: the messages before
the answer, rendered with the generation prompt, are the model's input, so the text after them in
the full conversation is its output. It ends where the same messages end when rendered alone; for
a template that writes the last answer differently, a mark is inserted after the answer.

If the template does not end an answer, the end-of-text token is appended, since the student would
otherwise learn never to stop. Whether a turn has an end is determined from what the template writes
after the answer, never from the answer itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kdrun.data.fields import BadRowError
from kdrun.data.given import MARK, Form, as_dicts, form_of, has_reasoning, without_reasoning
from kdrun.data.lost import find_lost, lost_tools, places, unsaid_calls
from kdrun.data.messages import Message
from kdrun.data.templates import USUAL_RENDERING, Rendering, template_of
from kdrun.data.turn_ends import TurnEnds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """The characters of one assistant turn: the answer and its end in the template.

    Attributes:
        start: The first character after the prompt for the answer.
        end: The end of the turn, including white space after it.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        text: The full text; every answer has an end.
        answers: The assistant turns in it.
        lost: What the template omits, as keys of `kdrun.data.lost.CONSEQUENCES`.
        unsaid: Answers, by number, of which the template writes nothing; they are no targets.
    """

    text: str
    answers: tuple[AnswerSpan, ...]
    lost: tuple[str, ...] = ()
    unsaid: frozenset[int] = frozenset()


class HiddenAnswersError(Exception):
    """The template does not allow locating the answers in the conversation."""


class ChatRenderer:
    """Render conversations with a tokenizer's chat template, or else with `PLAIN_TEMPLATE`.

    Args:
        tokenizer: The tokenizer that both models use.
        rendering: Settings that determine the text besides the template.

    Raises:
        InputError: The tokenizer has several templates, and none is the default.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = USUAL_RENDERING
    ) -> None:
        """Read the tokenizer's template."""
        self._tokenizer = tokenizer
        self._endings: dict[bool, str] = {}
        self._tools: Sequence[dict[str, Any]] | None = None
        self._arguments = dict(rendering.arguments)
        self._drops = rendering.reasoning == "drop"
        self._rendered = rendering.rendered
        self._brought = bool(tokenizer.chat_template) and not rendering.rendered
        self._template = template_of(tokenizer, rendering)

    def offering(self, tools: Sequence[dict[str, Any]] | None) -> ChatRenderer:
        """Return a renderer of conversations in which the assistant may use tools."""
        if not tools:
            return self
        # What follows from the template alone is found once and shared.
        assert self._form
        assert self._ends
        found = copy.copy(self)
        found._tools = list(tools)
        return found

    @property
    def reads_parts(self) -> bool:
        """Whether the template writes texts only if passed as lists of parts."""
        return self._form.parts

    @cached_property
    def _form(self) -> Form:
        return form_of(self._template, self._try) if self._brought else Form()

    def _try(self, given: list[dict[str, Any]]) -> str:
        try:
            return self._apply(given)
        except BadRowError:
            return ""

    @cached_property
    def _ends(self) -> TurnEnds:
        return TurnEnds(self._tokenizer)

    def render(self, messages: Sequence[Message], *, for_generation: bool = False) -> str:
        """Render a conversation, including special tokens: tokenise it without adding any.

        Args:
            messages: The conversation.
            for_generation: End with the template's generation prompt.

        Raises:
            BadRowError: The template rejects the conversation.
        """
        return self._apply(self.given(messages), for_generation)

    def given(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages in the form that this template accepts."""
        return as_dicts(messages, self._form)

    def kept(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a conversation as it is to be rendered, without reasoning if that is dropped.

        Raises:
            BadRowError: An answer is reasoning alone.
        """
        if not self._drops or not has_reasoning(messages):
            return messages
        found = without_reasoning(messages)
        if any(
            was.says_something and not now.says_something
            for was, now in zip(messages, found, strict=True)
        ):
            raise BadRowError("has an answer of reasoning alone, which data.reasoning=drop removes")
        return found

    def _apply(self, given: list[dict[str, Any]], for_generation: bool = False) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                given,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=for_generation,
                tools=self._tools,
                **self._arguments,
            )
        except Exception as error:
            # Templates are code that comes with a model, and may raise any error.
            raise refused_by_template(error) from error
        return rendered

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a model's answer to a conversation, exactly as in training.

        Raises:
            BadRowError: The template rejects the conversation.
            InputError: Neither the template nor the tokenizer has an end for earlier answers.
        """
        messages = self.kept(messages)
        prompt = self.render(messages, for_generation=True)
        if not any(message.role == "assistant" for message in messages):
            return prompt
        text = self.render(messages)
        if not prompt.startswith(text):
            return prompt
        try:
            ended = self._end_turns(messages, text, self._find_answers(messages, text)).text
        except HiddenAnswersError:
            return prompt
        return ended + prompt[len(text) :]

    def render_with_answers(self, messages: Sequence[Message]) -> RenderedChat:
        """Render a conversation that ends with an answer, and locate its answers.

        Raises:
            BadRowError: The template rejects the conversation, or omits an answer.
            HiddenAnswersError: The template writes a message differently when others follow it, so
                that the end of an answer cannot be determined.
            InputError: Neither the template nor the tokenizer has an end for answers.
        """
        messages = self.kept(messages)
        text = self.render(messages)
        answers = self._find_answers(messages, text)
        where = places(messages, text, [(a.start, a.end) for a in answers])
        lost = (*find_lost(messages, where), *self.lost_tools(messages, text))
        ended = self._end_turns(messages, text, answers)
        return replace(ended, lost=lost, unsaid=unsaid_calls(messages, where))

    def lost_tools(self, messages: Sequence[Message], text: str) -> tuple[str, ...]:
        """Return the kind of loss if the template does not write the tools."""
        if not self._tools:
            return ()
        without = copy.copy(self)
        without._tools = None
        return lost_tools(self._tools, text, without.render(messages))

    def _find_answers(self, messages: Sequence[Message], text: str) -> list[AnswerSpan]:
        answers: list[AnswerSpan] = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._start_of_answer(messages, turn, text, answers[-1].end if answers else 0)
            through = text if turn == len(messages) - 1 else self.render(messages[: turn + 1])
            if text.startswith(through):
                end = len(through)
            else:
                end = self._end_of_answer(messages, turn, text, through)
            if end < start:
                raise HiddenAnswersError
            answers.append(AnswerSpan(start, end))
        return answers

    def _end_turns(
        self, messages: Sequence[Message], text: str, answers: Sequence[AnswerSpan]
    ) -> RenderedChat:
        """Append an end to each answer that the template does not end."""
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        ended, place = "", 0
        spans = []
        for turn, span in zip(turns, answers, strict=True):
            start = len(ended) + span.start - place
            ended += text[place : span.end]
            place = span.end
            if self._needs_end(messages, turn, text, span):
                is_last = turn == len(messages) - 1
                opening = 0 if is_last else self._ends.opening(text[place:])
                if opening:
                    # GLM's templates do not end turns: the token that opens the next one does.
                    ended += text[place : place + opening]
                    place += opening
                else:
                    words = ended[: max(start, len(ended.rstrip()))]
                    # The turn includes white space that some special tokens absorb.
                    behind = "" if is_last else ended[len(words) :]
                    ended = words + self._ends.end_of_text() + behind
                    place = len(text) if is_last else place
            spans.append(AnswerSpan(start, len(ended)))
        return RenderedChat(ended + text[place:], tuple(spans))

    def _needs_end(
        self, messages: Sequence[Message], turn: int, text: str, span: AnswerSpan
    ) -> bool:
        """Return whether the template leaves an answer without an end.

        What it writes after a middle turn and after the last one depends only on the template, so
        it is determined with the first row and kept.
        """
        own = text[span.start : span.end]
        if self._rendered:
            return not self._ends.ends_itself(own)
        if messages[turn].tool_calls:
            # What closes a call is part of it, and may be a token, too, but no control token.
            return not self._ends.ends_itself(own)
        is_last = turn == len(messages) - 1
        ending = self._endings.get(is_last)
        if ending is None or not own.endswith(ending):
            try:
                ending = text[self._end_of_content(messages, turn, text) : span.end]
            except HiddenAnswersError:  # text before an answer depends on it
                ending = own
            else:
                self._endings.setdefault(is_last, ending)
        if not ending.strip():
            return True
        return is_last and not self._ends.is_end(ending)

    def _end_of_answer(
        self, messages: Sequence[Message], turn: int, text: str, through: str
    ) -> int:
        """Return the end of a middle turn if it differs from that of the last turn.

        Qwen3's template drops the reasoning from all answers but the last, and ends both alike;
        that of gpt-oss ends only the last one with ``<|return|>`` and others with ``<|end|>``.
        """
        rest = text[self._end_of_content(messages, turn, text) :]
        ending = through[self._end_of_content(messages[: turn + 1], turn, through) :]
        if not ending.strip() or not rest.startswith(ending):
            rest = rest.lstrip()
            ending = max((t for t in self._ends.special if rest.startswith(t)), key=len, default="")
            if not ending:
                raise HiddenAnswersError
        # Includes white space after it, which some special tokens absorb.
        return len(text) - len(rest[len(ending) :].lstrip())

    def _end_of_content(self, messages: Sequence[Message], turn: int, text: str) -> int:
        """Return where an answer ends in a rendered conversation."""
        marked = _marked(messages[turn])
        other = self.render([*messages[:turn], marked, *messages[turn + 1 :]])
        end = _shared_length(text, other)
        if not other.endswith(text[end:]):
            raise HiddenAnswersError
        return end

    def _start_of_answer(
        self, messages: Sequence[Message], turn: int, text: str, earliest: int
    ) -> int:
        before = messages[:turn]
        prompt = self.render(before, for_generation=True)
        if text.startswith(prompt):
            return len(prompt)
        # Templates of reasoning models end the prompt with an opening <think> that an answer may
        # lack: the part that both share after the earlier messages is the head of the turn.
        earlier = self.render(before)
        if text.startswith(earlier):
            return _shared_length(text, prompt)
        # Some write calls before the last question differently, such as without reasoning. The
        # head of the turn is then the last one before the end of its content.
        head = prompt[len(earlier) :] if prompt.startswith(earlier) else ""
        opening = max((len(t) for t in self._ends.special if head.startswith(t)), default=len(head))
        found = text[earliest : self._end_of_content(messages, turn, text)]
        for length in range(len(head), opening, -1):
            place = found.rfind(head[:length])
            if place >= 0:
                return earliest + place + length
        raise HiddenAnswersError


def refused_by_template(error: Exception) -> BadRowError:
    """Return the error for a conversation that a template fails on."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BadRowError(f"is rejected by the chat template ({reason})")


def _marked(message: Message) -> Message:
    """Return an answer with a mark at its end, which is in its last call if there is one."""
    if not message.tool_calls:
        return replace(message, content=message.content + MARK)
    *calls, last = message.tool_calls
    function = last["function"]
    given = function["arguments"]
    arguments = {**given, MARK: MARK} if isinstance(given, dict) else f"{given}{MARK}"
    return replace(
        message, tool_calls=[*calls, {**last, "function": {**function, "arguments": arguments}}]
    )


def _shared_length(left: str, right: str) -> int:
    differ = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differ, min(len(left), len(right)))
