"""Decoupled knowledge distillation."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import LOG_ZERO, kl_terms


class DecoupledKD(RowLoss):
    """Decoupled KD, alpha KL(b || b') + beta KL(p' || q'): label against rest, and within the rest.

    b = (p_y, 1 - p_y) and b' for the student are the two-way split at the label y; p' and q' are
    the distributions over the other tokens. Forward KL is KL(b || b') + (1 - p_y) KL(p' || q'):
    here the second part keeps its weight also where the teacher is sure of the label.

    Not for text without labels that mean something (sampled or noisy continuations), and not
    where the teacher is right with certainty: the distribution within the rest is then noise.

    Reference: Zhao et al. 2022 (Decoupled Knowledge Distillation), arXiv:2203.08679.
    """

    alpha: float = Field(1.0, ge=0, description="weight of label against rest")
    beta: float = Field(1.0, ge=0, description="weight of the divergence within the rest")

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Both parts from log-probabilities; ``log(1 - p_y)`` is a logsumexp over the others."""
        vocabulary = torch.arange(teacher_log_probs.shape[-1], device=labels.device)
        is_label = vocabulary == labels.unsqueeze(-1)
        teacher_split = _split(teacher_log_probs, is_label)
        student_split = _split(student_log_probs, is_label)
        between = kl_terms(teacher_split, student_split).sum(-1)
        within = torch.where(
            is_label,
            0.0,
            kl_terms(
                _rest(teacher_log_probs, teacher_split, is_label),
                _rest(student_log_probs, student_split, is_label),
            ),
        ).sum(-1)
        return self.alpha * between + self.beta * within


def _split(log_probs: Tensor, is_label: Tensor) -> Tensor:
    """Log-probabilities ``[..., 2]`` of the label and of everything else."""
    label = torch.where(is_label, log_probs, 0.0).sum(-1)
    rest = torch.where(is_label, LOG_ZERO, log_probs).logsumexp(-1)
    return torch.stack([label, rest], dim=-1)


def _rest(log_probs: Tensor, split: Tensor, is_label: Tensor) -> Tensor:
    """Log-probabilities within the rest; the label's entry is log 0."""
    return torch.where(is_label, LOG_ZERO, log_probs - split[..., 1:])
