"""Answers of a model to held-out prompts, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.config.sections import EvaluationConfig
from kdrun.data.chat import USUAL_RENDERING, Rendering
from kdrun.data.fields import BadRowError
from kdrun.data.formats import ChatRow
from kdrun.data.messages import Message
from kdrun.data.records import Position
from kdrun.data.split import content_hash
from kdrun.evaluation.scores import check_rouge, exact_match, rouge_l
from kdrun.models.generation import encode_prompt, generate

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


@dataclass(frozen=True)
class Asked:
    """What has to be known of a model before it is asked.

    Attributes:
        tokenizer: encodes its prompts.
        context: tokens that it has room for; None where it has no limit.
        rendering: what its prompts follow from besides the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    rendering: Rendering = USUAL_RENDERING


def choose_questions(
    rows: Sequence[Any], model: Asked, config: EvaluationConfig
) -> tuple[list[Question], str | None]:
    """The questions that one model is asked, the same whatever the order of the rows.

    Args:
        rows: held-out rows; plain text asks nothing.
        model: has to have room for prompt and answer; longer prompts are left out.
        config: how many, and how long answers may be.

    Returns:
        The questions, and a line about them where some were wanted.

    Raises:
        InputError: the package rouge-score, which scores answers, is not installed.
    """
    (questions,), note = choose_common_questions(rows, [model], config)
    return questions, note


def choose_common_questions(
    rows: Sequence[Any], models: Sequence[Asked], config: EvaluationConfig
) -> tuple[list[list[Question]], str | None]:
    """The same questions for several models, whatever the order of the rows.

    Args:
        rows: held-out rows; plain text asks nothing.
        models: a prompt that leaves no room for an answer in the context of one is asked of none.
        config: how many, and how long answers may be.

    Returns:
        The questions of each model, as its own tokenizer encodes them, and a line about them where
        some were wanted.

    Raises:
        InputError: the package rouge-score, which scores answers, is not installed.
    """
    found: list[list[Question]] = [[] for _ in models]
    if config.answers == 0:
        return found, None
    references: dict[tuple[Message, ...], list[str]] = {}
    for row in rows:
        if isinstance(row, ChatRow):
            references.setdefault(row.messages[:-1], []).append(row.messages[-1].content)
    if not references:
        return found, "answers: none, because the held-out rows are plain text without prompts"
    check_rouge()
    count = left_out = 0
    for messages in sorted(references, key=_hash):
        if count == config.answers:
            break
        prompts = [_fitting_prompt(messages, model, config.max_new_tokens) for model in models]
        if not all(prompts):
            left_out += 1
            continue
        count += 1
        for questions, ids in zip(found, prompts, strict=True):
            questions.append(Question(messages, tuple(references[messages]), tuple(ids)))
    note = (
        f"answers: to {count} of {len(references)} held-out prompts, at most "
        f"{config.max_new_tokens} tokens each"
    )
    if left_out:
        note += f"; {left_out} prompts that leave no room for an answer are skipped"
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


def _fitting_prompt(messages: tuple[Message, ...], model: Asked, max_new_tokens: int) -> list[int]:
    """The prompt's ids; none where it leaves no room for an answer, or is refused."""
    try:
        ids = encode_prompt(model.tokenizer, messages, model.rendering)
    except BadRowError:
        return []
    fits = model.context is None or len(ids) <= model.context - max_new_tokens
    return ids if fits else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _hash(messages: tuple[Message, ...]) -> str:
    return content_hash(ChatRow(messages, Position("", 0)))
