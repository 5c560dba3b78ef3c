"""Losses that compare the shape of two rows and leave scale or sharpness free."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses import RowLoss
from kdlosses.numerics import LOG_ZERO, kl_terms, log_softmax

_FLAT_PROBS = 1e-6
"""A row of probabilities whose spread is below this share of its length is uniform but for
rounding."""

_FLAT_LOGITS = 1e-5
"""Likewise the standard deviation of log-probabilities, whose rounding is about 1e-6."""


class Pearson(RowLoss):
    """Pearson distance, 1 - corr(p, q) over the vocabulary.

    The inter-class relation of DIST: the student has to order and space the tokens as the teacher
    does, but a mixture of the teacher with the uniform distribution costs nothing. In [0, 2]. The
    temperature decides how much of the tail is seen; it does not change the size of the value.

    Not where calibrated probabilities matter, since the value is 0 for many students besides the
    teacher, and not alone: DIST adds cross-entropy (and a relation between the rows of a batch,
    which no loss of single rows can have). A uniform row has no correlation; as student it
    receives no gradient.

    Reference: Huang et al. 2022 (Knowledge Distillation from A Stronger Teacher),
    arXiv:2205.10536.
    """

    temperature_power = 0

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared distance of the unit vectors, which does not cancel as 1 - corr does."""
        gap = _direction(teacher_log_probs.exp()) - _direction(student_log_probs.exp())
        return (gap * gap).sum(-1) / 2


class StandardizedKL(RowLoss):
    """Standardised forward KL, tau^2 KL(p' || q') with p' = softmax(zscore(log p) / tau).

    Both rows of logits are brought to mean 0 and standard deviation 1 over the vocabulary, so a
    student with small logits need not reach the teacher's large ones. The temperature of the
    objective cancels in it; ``base_temperature``, tau, takes its place. Tokens that a side rules
    out stay out of its mean and deviation.

    Not where calibrated probabilities matter: the value is 0 for every student whose logits are
    the teacher's, stretched by any factor; cross-entropy has to settle the factor. Not for
    vocabularies with many tokens that never occur: their logits then decide mean and deviation.

    Reference: Sun et al. 2024 (Logit Standardization in Knowledge Distillation),
    arXiv:2403.01427.
    """

    temperature_power = 0

    base_temperature: float = Field(2.0, gt=0, le=100, description="tau, after standardising")

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Forward KL of the standardised rows."""
        tau = self.base_temperature
        teacher, student = (_standardized(x, tau) for x in (teacher_log_probs, student_log_probs))
        return tau * tau * kl_terms(teacher, student).sum(-1)


def _direction(probs: Tensor) -> Tensor:
    """The centred row as a unit vector; zeros, without a gradient, where it is uniform."""
    centred = probs - probs.mean(-1, keepdim=True)
    squares = (centred * centred).sum(-1, keepdim=True)
    flat = squares.detach() <= _FLAT_PROBS**2 * (probs.detach() ** 2).sum(-1, keepdim=True)
    length = torch.where(flat, 1.0, squares).sqrt()
    return torch.where(flat, 0.0, centred / length)


def _standardized(log_probs: Tensor, tau: float) -> Tensor:
    """Log-probabilities of the standardised row at temperature tau."""
    possible = log_probs > LOG_ZERO / 2
    count = possible.sum(-1, keepdim=True)
    known = torch.where(possible, log_probs, 0.0)
    centred = torch.where(possible, known - known.sum(-1, keepdim=True) / count, 0.0)
    # Divided by n - 1 as the authors do; one possible token has no deviation.
    variance = (centred * centred).sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    flat = variance.detach() <= _FLAT_LOGITS**2
    deviation = torch.where(flat, 1.0, variance).sqrt()
    scores = torch.where(flat, 0.0, centred / deviation)
    return log_softmax(torch.where(possible, scores / tau, LOG_ZERO))
