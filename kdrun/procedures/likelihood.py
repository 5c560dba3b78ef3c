"""The likelihood of single tokens as a kdlosses loss, chunked and differentiable."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from kdlosses import RowLoss, TokenLoss


class Likelihood(RowLoss):
    """Negative log-likelihood of the row's label, -log q(y), independent of the teacher."""

    zero_at_equality: ClassVar[bool] = False
    temperature_power: ClassVar[int] = 0

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """One value per row."""
        return -student_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def token_log_probs(student: Any, labels: Tensor, like: TokenLoss) -> Tensor:
    """Log-probability of each label under the student, 0 where ignored; differentiable.

    Args:
        student: logits or :class:`kdlosses.Projected`.
        labels: labels aligned with the logits.
        like: loss whose chunks and shared vocabulary are used.
    """
    evaluate = TokenLoss(
        Likelihood(),
        chunking=like.chunking,
        ignore_index=like.ignore_index,
        vocab_size=like.vocab_size,
    )
    # A loss needs a teacher; passing the student itself is cheapest.
    values: Tensor = evaluate(student, student, labels, reduction="none")
    return -values
