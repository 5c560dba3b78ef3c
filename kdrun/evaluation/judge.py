"""All measures of one model, on its distributions and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_held_out
from kdrun.evaluation.answers import Asked, Question, ask, choose_questions, mean_scores
from kdrun.evaluation.measures import measure_model
from kdrun.losses.build import build_loss
from kdrun.models.context import context_limit

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from kdrun.config.data_section import DataConfig
    from kdrun.config.sections import LossConfig
    from kdrun.config.training_sections import EvaluationConfig
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
    """Evaluate a model outside of training.

    Args:
        model: a causal language model with the pair's tokenizer.
        teacher: the teacher to compare with, or None.
        pair: the pair, for tokenizer and vocabulary.
        data: section with the tokenisation settings.
        loss: section with the chunk size.
        evaluation: section with the questions.
        batch_size: rows per batch.
        rows: texts or conversations to evaluate on.
        progress: prints how rows are processed.
        questions: questions to answer; None chooses those that fit into the context.

    Returns:
        Values by the names of :data:`kdrun.evaluation.yardsticks.YARDSTICKS`, and ``tokens``; None
        if a yardstick does not apply.

    Raises:
        InputError: no row fits.
    """
    encoder = Encoder.of(data, pair.tokenizer, pair.left_out)
    examples, notes = encode_held_out(rows, encoder)
    note = None
    if questions is None:
        questions, note = choose_questions(
            rows, Asked(pair.tokenizer, context_limit(model.config), encoder.rendering), evaluation
        )
    if teacher is None:  # print notes on the rows once: this model is evaluated first
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
