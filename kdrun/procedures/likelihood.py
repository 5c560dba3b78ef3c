"""The likelihood of single tokens, in chunks and with a gradient, as a loss of the library."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from kdlosses import RowLoss, TokenLoss


class Likelihood(RowLoss):
    """Negative log-likelihood of the row's own token, -log q(y); the teacher has no say."""

    zero_at_equality: ClassVar[bool] = False
    temperature_power: ClassVar[int] = 0

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """One value per row."""
        return -student_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def token_log_probs(student: Any, labels: Tensor, like: TokenLoss) -> Tensor:
    """Log-probability of each label under the student, 0 where ignored; differentiable.

    Args:
        student: logits or :class:`kdlosses.Projected`.
        labels: aligned with the logits.
        like: gives the chunks and the cut of the vocabulary.
    """
    evaluate = TokenLoss(
        Likelihood(),
        chunking=like.chunking,
        ignore_index=like.ignore_index,
        vocab_size=like.vocab_size,
    )
    # A loss needs a teacher's side; the student's own is the cheaper one.
    values: Tensor = evaluate(student, student, labels, reduction="none")
    return -values
