"""Answers of a model to held-out prompts, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.config.training_sections import EvaluationConfig
from kdrun.data.fields import BadRowError
from kdrun.data.formats import ChatRow
from kdrun.data.hashes import prompt_hash
from kdrun.data.messages import Message
from kdrun.data.templates import USUAL_RENDERING, Rendering
from kdrun.evaluation.scores import check_rouge, exact_match, rouge_l
from kdrun.models.generation import encode_prompt, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt and its reference answers.

    Attributes:
        messages: the conversation up to the answer.
        references: reference answers; rows with the same prompt form one question.
        prompt_ids: token ids of the prompt.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """The properties of a model that determine its prompts.

    Attributes:
        tokenizer: tokenizer for the prompts.
        context: context length in tokens; None if unlimited.
        rendering: settings of the rendering other than the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    rendering: Rendering = USUAL_RENDERING


def choose_questions(
    rows: Sequence[Any], model: Asked, config: EvaluationConfig
) -> tuple[list[Question], str | None]:
    """Choose the questions for one model, independent of the order of the rows.

    Args:
        rows: held-out rows; plain text gives no questions.
        model: the model; prompts that leave no room for an answer in its context are skipped.
        config: number of questions and maximum length of answers.

    Returns:
        The questions, and a line that describes them if any were requested.

    Raises:
        InputError: the package rouge-score, which scores answers, is not installed.
    """
    (questions,), note = choose_common_questions(rows, [model], config)
    return questions, note


def choose_common_questions(
    rows: Sequence[Any], models: Sequence[Asked], config: EvaluationConfig
) -> tuple[list[list[Question]], str | None]:
    """Choose the same questions for several models, independent of the order of the rows.

    Args:
        rows: held-out rows; plain text gives no questions.
        models: the models; a prompt is skipped if any of them has no room for an answer.
        config: number of questions and maximum length of answers.

    Returns:
        The questions for each model, encoded by its tokenizer, and a line that describes them if
        any were requested.

    Raises:
        InputError: the package rouge-score, which scores answers, is not installed.
    """
    found: list[list[Question]] = [[] for _ in models]
    if config.answers == 0:
        return found, None
    asked: dict[str, ChatRow] = {}
    references: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row, ChatRow) and row.messages[-1].content:  # not a tool call alone
            key = prompt_hash(row)
            asked.setdefault(key, row)
            references.setdefault(key, []).append(row.messages[-1].content)
    if not references:
        return found, "answers: none, because the held-out rows are plain text without prompts"
    check_rouge()
    count = left_out = 0
    for key in sorted(references):
        if count == config.answers:
            break
        prompts = [_fitting_prompt(asked[key], model, config.max_new_tokens) for model in models]
        if not all(prompts):
            left_out += 1
            continue
        count += 1
        for questions, ids in zip(found, prompts, strict=True):
            messages = asked[key].messages[:-1]
            questions.append(Question(messages, tuple(references[key]), tuple(ids)))
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
        question: the question.
        text: the text of the answer.
        rouge_l: see :func:`kdrun.evaluation.scores.rouge_l`.
        exact_match: see :func:`kdrun.evaluation.scores.exact_match`; None without a pattern.
    """

    question: Question
    text: str
    rouge_l: float
    exact_match: float | None

    def line(self) -> Mapping[str, Any]:
        """The line of ``answers.jsonl``."""
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
    """Generate greedy answers with a model and score them.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer that encoded the questions.
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
    """``rouge_l`` and ``exact_match`` over all answers; None if there are none."""
    matches = [answer.exact_match for answer in answers if answer.exact_match is not None]
    return {
        "rouge_l": _mean([answer.rouge_l for answer in answers]),
        "exact_match": _mean(matches),
    }


def _fitting_prompt(row: ChatRow, model: Asked, max_new_tokens: int) -> list[int]:
    """The token ids of a prompt; empty if it leaves no room for an answer or is refused."""
    try:
        ids = encode_prompt(model.tokenizer, row.messages[:-1], model.rendering, row.tools)
    except BadRowError:
        return []
    fits = model.context is None or len(ids) <= model.context - max_new_tokens
    return ids if fits else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
