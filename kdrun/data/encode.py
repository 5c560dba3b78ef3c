"""Adds to transformers' tokenizers: token ids of a conversation with the labels of its answers.

Labels follow Hugging Face's convention: ``labels[i] == input_ids[i]`` where token i is a target,
-100 elsewhere. Nothing is shifted here; `kdrun.data.collate` does that. Only the assistant's
answers are targets, each with its end-of-turn token, and nothing that the template writes after it.
Whether a token is a target depends on its position, never on its id, so that an end-of-text token
that is also the padding token stays a target.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kdrun.data.chat import ChatRenderer, HiddenAnswersError, RenderedChat, refused_by_template
from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.encode_report import (
    EncodedRows,
    find_controls,
    no_room,
    no_room_for_teacher,
    report_on,
    too_long,
    too_long_for_teacher,
)
from kdrun.data.encoding import Encoding, Example
from kdrun.data.fields import BadRowError
from kdrun.data.formats import ChatRow
from kdrun.data.lost import Place, find_lost
from kdrun.data.messages import Message
from kdrun.data.templates import USUAL_RENDERING, Rendering, template_of
from kdrun.data.turn_ends import special_tokens
from kdrun.data.view import View, example_of, join_prompts, targets_in_both
from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH = 1000
_UNLED = (
    "has several answers to learn, of which the teacher's prompt leads to the last alone; set "
    "data.supervise=last, or give 'teacher_messages' with all of them"
)
LongRows = Literal["cut", "skip"]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenised conversation: its ids, the ranges of answers, and what is missing."""

    ids: list[int]
    answers: list[range]
    lost: tuple[str, ...] = ()


def encode_chats(
    rows: Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    long_rows: LongRows = "cut",
    rendering: Rendering = USUAL_RENDERING,
) -> EncodedRows:
    """Turn conversations into examples.

    An example longer than `max_length` is cut at its end, or its row is skipped. If no part of an
    answer would remain, because the prompt fills the length, the row is skipped.

    Args:
        rows: Conversations.
        tokenizer: The tokenizer of both models; its chat template is used if it has one.
        max_length: Maximum number of tokens in an example.
        long_rows: What to do with longer rows.
        rendering: Settings that determine their text besides the template.

    Returns:
        At least one example.

    Raises:
        InputError: No row remains, or the chat template does not allow locating answers.
    """
    return report_on(rows, encode(rows, tokenizer, max_length, long_rows, rendering), max_length)


def encode(
    rows: Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    long_rows: LongRows = "cut",
    rendering: Rendering = USUAL_RENDERING,
    view: View | None = None,
) -> Encoding:
    """Like `encode_chats`, without the report; there may be no examples.

    With a `view`, or where rows have messages for the teacher, examples have the teacher's tokens.
    """
    view = view or View(max_length, rendering)
    for key, most in (("max_length", max_length), ("teacher_max_length", view.max_length)):
        if most < 2:
            raise InputError(f"data.{key}={most}: must be at least 2")
    found = _Found(max_length, view.max_length, long_rows)
    views = _views(rows, tokenizer, view)
    for number, tokens in enumerate(_tokenise(rows, tokenizer, rendering)):
        found.add(number, tokens, next(views))
    examples, prompts = found.examples, found.prompts
    return Encoding(
        examples=examples,
        skipped=found.skipped,
        cut=found.cut,
        lost=found.lost,
        controls=find_controls(rows, tokenizer),
        shortest=(min(prompts), min(found.lengths)) if prompts else None,
        tokens=sum(len(example["input_ids"]) for example in examples),
        supervised=found.supervised,
        rewritten=found.rewritten,
    )


@dataclass
class _Found:
    """What becomes of rows, one after another.

    Attributes:
        max_length: maximum number of tokens of an example.
        most: the same of what the teacher reads.
        long_rows: what to do with longer rows.
    """

    max_length: int
    most: int
    long_rows: LongRows
    examples: list[Example] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0

    def add(
        self, number: int, tokens: _Tokens | BadRowError, seen: _Tokens | BadRowError | None
    ) -> None:
        """Add the example of a row, or the reason why there is none.

        Args:
            number: of the row.
            tokens: the student's.
            seen: the teacher's; None if it reads the same.
        """
        if isinstance(tokens, BadRowError):
            self.skipped.append((number, str(tokens)))
            return
        self.prompts.append(tokens.answers[0].start)
        self.lengths.append(len(tokens.ids))
        if len(tokens.ids) > self.max_length and self.long_rows == "skip":
            self.skipped.append((number, too_long(self.max_length)))
            return
        example = _example(tokens, self.max_length)
        # The first token of a row has no context that could predict it.
        if not _targets(example):
            self.skipped.append((number, no_room(self.max_length)))
            return
        is_cut = len(tokens.ids) > self.max_length
        if seen is not None:
            both = self._with_view(number, tokens, seen)
            if both is None:
                return
            example, cut_there = both
            is_cut = is_cut or cut_there
        if is_cut:
            self.cut.append(number)
        self.lost += [(number, kind) for kind in tokens.lost]
        self.examples.append(example)
        self.supervised += _targets(example)

    def _with_view(
        self, number: int, tokens: _Tokens, seen: _Tokens | BadRowError
    ) -> tuple[Example, bool] | None:
        """Return an example with the teacher's tokens, and whether these are cut."""
        if not isinstance(seen, BadRowError) and len(seen.answers) != len(tokens.answers):
            seen = BadRowError(_UNLED)
        if isinstance(seen, BadRowError):
            self.skipped.append((number, f"cannot be shown to the teacher: it {seen}"))
            return None
        context, answers = join_prompts(tokens.ids, tokens.answers, seen.ids, seen.answers)
        is_cut = answers[-1].stop > self.most
        if is_cut and self.long_rows == "skip":
            self.skipped.append((number, too_long_for_teacher(self.most)))
            return None
        targets = targets_in_both(tokens.answers, self.max_length, answers, self.most)
        if not targets:
            self.skipped.append((number, no_room_for_teacher(self.most)))
            return None
        if context != seen.ids:
            self.rewritten.append(number)
        return example_of(tokens.ids, context, targets), is_cut


def _targets(example: Example) -> int:
    labels = example["labels"][1:]
    return len(labels) - labels.count(IGNORE_INDEX)


def _views(
    rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase, view: View
) -> Iterator[_Tokens | BadRowError | None]:
    """Yield what the teacher reads for each row; None if that is what the student reads."""
    own = [view.is_given or row.teacher is not None for row in rows]
    pairs = zip(rows, own, strict=True)
    seen = [replace(row, messages=row.teacher or row.messages) for row, has_own in pairs if has_own]
    found = _tokenise(seen, tokenizer, view.rendering)
    yield from (next(found) if has_own else None for has_own in own)


def _example(tokens: _Tokens, max_length: int) -> Example:
    ids = tokens.ids[:max_length]
    labels = [IGNORE_INDEX] * len(ids)
    for answer in tokens.answers:
        labels[answer.start : answer.stop] = ids[answer.start : answer.stop]
    return Example(input_ids=ids, labels=labels)


def _tokenise(
    rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[_Tokens | BadRowError]:
    renderer = ChatRenderer(tokenizer, rendering)
    finder = _AnswerFinder(tokenizer)
    for first in range(0, len(rows), _BATCH):
        batch = rows[first : first + _BATCH]
        renderers = [renderer.offering(row.tools) for row in batch]
        chats = [_render(own, row) for own, row in zip(renderers, batch, strict=True)]
        texts = [chat.text for chat in chats if isinstance(chat, RenderedChat)]
        encoded = iter(_encode_texts(tokenizer, texts))
        for own, row, chat in zip(renderers, batch, chats, strict=True):
            if isinstance(chat, RenderedChat):
                ids, ends = next(encoded)
                yield _learned(finder.find(chat, ids, ends), row, rendering, chat.unsaid)
            elif isinstance(chat, HiddenAnswersError):
                found = _by_generation_blocks(tokenizer, own, row, rendering)
                yield found if isinstance(found, BadRowError) else _learned(found, row, rendering)
            else:
                yield chat


def _learned(
    tokens: _Tokens, row: ChatRow, rendering: Rendering, unsaid: frozenset[int] = frozenset()
) -> _Tokens | BadRowError:
    """Return the answers that are targets; the others remain in the text."""
    learned = [message.learned for message in row.messages if message.role == "assistant"]
    if rendering.supervise == "last":
        learned = [False] * (len(learned) - 1) + learned[-1:]
        if not any(learned):
            return BadRowError("marks its last answer as not to be learned")
    learned = [own and number not in unsaid for number, own in enumerate(learned)]
    if not any(learned):
        return BadRowError("has a tool call that the chat template omits")
    if all(learned):
        return tokens
    if len(learned) != len(tokens.answers):
        return BadRowError(
            "marks answers as not to be learned, which the template's {% generation %} blocks do "
            "not distinguish"
        )
    chosen = [answer for answer, own in zip(tokens.answers, learned, strict=True) if own]
    return _Tokens(tokens.ids, chosen, tokens.lost)


def _render(
    renderer: ChatRenderer, row: ChatRow
) -> RenderedChat | BadRowError | HiddenAnswersError:
    try:
        return renderer.render_with_answers(row.messages)
    except (BadRowError, HiddenAnswersError) as error:
        return error


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[tuple[list[int], list[int] | None]]:
    """Return the token ids of rendered conversations, and where each token ends in the text.

    The text already contains the special tokens, so none is added: otherwise there would be a
    second begin-of-text token. A tokenizer written in Python does not know where its tokens end.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,
    )
    if not tokenizer.is_fast:
        return [(list(ids), None) for ids in encoded["input_ids"]]
    ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
    return list(zip(encoded["input_ids"], ends, strict=True))


class _AnswerFinder:
    """Find the tokens of answers, up to and including the end-of-turn token of each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(special_tokens(tokenizer).values())
        self._blank: dict[tuple[int, ...], bool] = {}

    def find(self, chat: RenderedChat, ids: list[int], ends: list[int] | None) -> _Tokens:
        if ends is None:
            ids, answers = self._tokenise_in_pieces(chat)
        else:
            # A token belongs to the span that it ends in: one that joins the last character of
            # the prompt to the first of the answer is part of the model's output.
            answers = [
                range(bisect_right(ends, span.start), bisect_right(ends, span.end))
                for span in chat.answers
            ]
        return _Tokens(ids, [self._end_turn(ids, answer) for answer in answers], chat.lost)

    def _end_turn(self, ids: list[int], answer: range) -> range:
        """Stop after the end-of-turn token; without one, after the last visible token."""
        stop = answer.stop
        while stop > answer.start and self._is_blank(ids[stop - 1 : stop]):
            stop -= 1
        return range(answer.start, stop)

    def _is_blank(self, ids: list[int]) -> bool:
        """Return whether tokens are white space, which may follow the end-of-turn token."""
        key = tuple(ids)
        if key not in self._blank:
            text: str = self._tokenizer.decode(ids)
            self._blank[key] = not self._special.intersection(ids) and not text.strip()
        return self._blank[key]

    def _tokenise_in_pieces(self, chat: RenderedChat) -> tuple[list[int], list[range]]:
        ids: list[int] = []
        answers: list[range] = []
        place = 0
        for span in chat.answers:
            ids += self._encode(chat.text[place : span.start])
            answer = self._encode(chat.text[span.start : span.end])
            answers.append(range(len(ids), len(ids) + len(answer)))
            ids += answer
            place = span.end
        return ids + self._encode(chat.text[place:]), answers

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _by_generation_blocks(
    tokenizer: PreTrainedTokenizerBase,
    renderer: ChatRenderer,
    row: ChatRow,
    rendering: Rendering,
) -> _Tokens | BadRowError:
    """Locate answers by the template's own ``{% generation %}`` blocks."""
    template = template_of(tokenizer, rendering)
    if "generation %}" not in template and "generation -%}" not in template:
        if any(message.tool_calls for message in row.messages):
            # Gemma's templates join calls, their results and the answer to one turn.
            return BadRowError("has tool calls that cannot be told apart in the chat template")
        raise InputError(
            f"{row.position}: the chat template writes earlier messages differently when later "
            "ones follow, so its answers cannot be found; use rows with one answer, or mark the "
            "answers in the template with {% generation %}"
        )
    try:
        messages = renderer.kept(row.messages)
    except BadRowError as error:
        return error
    try:
        encoded: Any = tokenizer.apply_chat_template(
            renderer.given(messages),
            chat_template=template,
            tools=row.tools,
            **rendering.arguments,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:  # as for every template
        return refused_by_template(error)
    ids: list[int] = list(encoded["input_ids"])
    mask: list[int] = list(encoded["assistant_masks"])
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    answers = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if not answers:
        return BadRowError("has no answer in the template's {% generation %} blocks")
    turns = [str(tokenizer.decode(ids[answer.start : answer.stop])) for answer in answers]
    try:
        text = renderer.render(messages)
        lost = find_lost(messages, _blocks(messages, text, turns))
    except BadRowError as error:
        return error
    return _Tokens(ids, answers, (*lost, *renderer.lost_tools(messages, text)))


def _blocks(messages: Sequence[Message], text: str, turns: Sequence[str]) -> list[Place]:
    """Return where messages must appear: answers in their blocks, others anywhere."""
    answers = [message for message in messages if message.role == "assistant"]
    # A template may write several answers as one block, or one as several.
    blocks = iter(turns if len(turns) == len(answers) else ["".join(turns)] * len(answers))
    return [Place(next(blocks) if m.role == "assistant" else text) for m in messages]
