"""Answers of a model to held-out prompts, and their scores."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.config import EvaluationConfig
from kdrun.data.formats import BadRowError, ChatRow, Message
from kdrun.data.records import Position
from kdrun.data.split import content_hash
from kdrun.evaluation.scores import check_rouge, exact_match, rouge_l
from kdrun.generation import encode_prompt, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt and what may be answered to it.

    Attributes:
        messages: the conversation up to the answer.
        references: right answers; rows with the same prompt are one question.
        prompt_ids: what the model is given.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    prompt_ids: tuple[int, ...]


def choose_questions(
    rows: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    model: PreTrainedModel,
) -> tuple[list[Question], str | None]:
    """The questions that models are asked, the same whatever the order of the rows.

    Args:
        rows: held-out rows; plain text asks nothing.
        tokenizer: encodes the prompts.
        config: how many, and how long answers may be.
        model: has to have room for prompt and answer; longer prompts are left out.

    Returns:
        The questions, and a line about them where some were wanted.

    Raises:
        InputError: the package rouge-score, which scores answers, is not installed.
    """
    if config.answers == 0:
        return [], None
    references: dict[tuple[Message, ...], list[str]] = {}
    for row in rows:
        if isinstance(row, ChatRow):
            references.setdefault(row.messages[:-1], []).append(row.messages[-1].content)
    if not references:
        return [], "answers: none, the held-out rows are plain text and ask nothing"
    check_rouge()
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    found: list[Question] = []
    left_out = 0
    for messages in sorted(references, key=_hash):
        if len(found) == config.answers:
            break
        try:
            ids = encode_prompt(tokenizer, messages)
        except BadRowError:
            ids = []
        if 0 < len(ids) <= room - config.max_new_tokens:
            found.append(Question(messages, tuple(references[messages]), tuple(ids)))
        else:
            left_out += 1
    note = (
        f"answers: to {len(found)} of {len(references)} held-out prompts, at most "
        f"{config.max_new_tokens} tokens each"
    )
    if left_out:
        note += f"; {left_out} prompts that leave no room for an answer are passed over"
    return found, note


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its scores.

    Attributes:
        question: what was asked.
        text: what the model said.
        rouge_l: see :func:`kdrun.evaluation.scores.rouge_l`.
        exact_match: see :func:`kdrun.evaluation.scores.exact_match`; None without a pattern.
    """

    question: Question
    text: str
    rouge_l: float
    exact_match: float | None

    def line(self) -> Mapping[str, Any]:
        """As a line of ``answers.jsonl``."""
        return {
            "messages": [
                {"role": message.role, "content": message.content}
                for message in self.question.messages
            ],
            "references": list(self.question.references),
            "answer": self.text,
            "rouge_l": round(self.rouge_l, 6),
            "exact_match": self.exact_match,
        }


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: EvaluationConfig,
) -> list[ScoredAnswer]:
    """Let a model answer greedily, and score it.

    Args:
        model: a causal language model.
        tokenizer: that encoded the questions.
        questions: from :func:`choose_questions`.
        config: length of answers, batch size, pattern of the final answer.

    Raises:
        InputError: the package rouge-score is not installed.
    """
    answers = generate(
        model,
        tokenizer,
        [question.prompt_ids for question in questions],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    found = []
    for question, ids in zip(questions, answers, strict=True):
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        pattern = config.answer_pattern
        match = None if pattern is None else exact_match(text, question.references, pattern)
        found.append(ScoredAnswer(question, text, rouge_l(text, question.references), match))
    return found


def mean_scores(answers: Sequence[ScoredAnswer]) -> dict[str, float | None]:
    """``rouge_l`` and ``exact_match`` over all answers; None where nothing was asked or scored."""
    matches = [answer.exact_match for answer in answers if answer.exact_match is not None]
    return {
        "rouge_l": _mean([answer.rouge_l for answer in answers]),
        "exact_match": _mean(matches),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _hash(messages: tuple[Message, ...]) -> str:
    return content_hash(ChatRow(messages, Position("", 0)))
