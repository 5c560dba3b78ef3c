"""All measures of one model: of its distributions and of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdrun.data.chat import Rendering
from kdrun.data.prepare import encode_held_out
from kdrun.data.token_cache import TokenCache
from kdrun.evaluation.answers import Asked, Question, ask, choose_questions, mean_scores
from kdrun.evaluation.measures import measure_model
from kdrun.losses.build import build_loss
from kdrun.models.context import context_limit

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from kdrun.config.sections import DataConfig, EvaluationConfig, LossConfig
    from kdrun.models.heads import Teacher
    from kdrun.models.pairs import Pair


def judge(
    model: PreTrainedModel,
    teacher: Teacher | None,
    pair: Pair,
    data: DataConfig,
    loss: LossConfig,
    evaluation: EvaluationConfig,
    batch_size: int,
    rows: Sequence[Any],
    progress: Console,
    questions: Sequence[Question] | None = None,
) -> dict[str, Any]:
    """Measure a model that nothing is to be trained of.

    Args:
        model: a causal language model with the pair's tokenizer.
        teacher: what it is compared with, or None.
        pair: gives tokenizer and vocabulary.
        data: how rows become tokens.
        loss: gives the chunk size.
        evaluation: what is asked.
        batch_size: rows at once.
        rows: to measure on, texts or conversations.
        progress: is told what becomes of the rows.
        questions: what it is asked; None chooses those that it has room for.

    Returns:
        Values by the names of :data:`kdrun.evaluation.yardsticks.YARDSTICKS`, and ``tokens``; None
        where one does not apply.

    Raises:
        InputError: no row fits.
    """
    cache = TokenCache.at(data.cache_dir)
    rendering = Rendering.of(data)
    settings = (pair.tokenizer, data.max_length, data.long_rows, cache, rendering, pair.left_out)
    examples, notes = encode_held_out(rows, *settings, data.strict)
    note = None
    if questions is None:
        questions, note = choose_questions(
            rows, Asked(pair.tokenizer, context_limit(model.config), rendering), evaluation
        )
    if teacher is None:  # it comes first, or is alone: what is said of the rows is said once
        for line in (*notes, note):
            if line is not None:
                progress.print(line, markup=False)
    found = measure_model(
        model,
        teacher,
        build_loss(loss, pair.vocab_size),
        examples,
        pair.tokenizer,
        batch_size,
    )
    if questions:
        found |= mean_scores(ask(model, pair.tokenizer, questions, evaluation))
    return found
