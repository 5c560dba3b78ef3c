"""Decoupled knowledge distillation."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import LOG_ZERO, kl_terms


class DecoupledKD(RowLoss):
    """Decoupled KD, alpha KL(b || b') + beta KL(p' || q'): label against rest, and within the rest.

    b = (p_y, 1 - p_y) and, for the student, b' are the binary distributions of the label y and the
    rest; p' and q' are the distributions over the other tokens. Forward KL is
    KL(b || b') + (1 - p_y) KL(p' || q'); here the second part keeps its weight even if the teacher
    is certain of the label.

    Not recommended for text without meaningful labels (sampled or noisy continuations), or if the
    teacher is certain of the label, because the distribution within the rest is then noise.

    Reference: Zhao et al. 2022 (Decoupled Knowledge Distillation), arXiv:2203.08679.
    """

    alpha: float = Field(
        1.0, ge=0, description="weight of the divergence between the label and the rest"
    )
    beta: float = Field(1.0, ge=0, description="weight of the divergence within the rest")

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Both parts, where ``log(1 - p_y)`` is a logsumexp over the other tokens."""
        vocabulary = torch.arange(teacher_log_probs.shape[-1], device=labels.device)
        is_label = vocabulary == labels.unsqueeze(-1)
        teacher_split, teacher_rest = _split(teacher_log_probs, is_label)
        student_split, student_rest = _split(student_log_probs, is_label)
        between = kl_terms(teacher_split, student_split).sum(-1)
        within = kl_terms(teacher_rest, student_rest).sum(-1)
        within = torch.where(teacher_split[..., 1] > LOG_ZERO, within, 0.0)
        return self.alpha * between + self.beta * within


def _split(log_probs: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[..., 2]`` of label and rest, and ``[..., V]`` within the rest.

    The latter are log 0 at the label, and everywhere if the rest has no mass.
    """
    label = torch.where(is_label, log_probs, 0.0).sum(-1, keepdim=True)
    others = torch.where(is_label, LOG_ZERO, log_probs)
    top = others.amax(-1, keepdim=True).detach()
    shifted = others - top
    total = shifted.exp().sum(-1, keepdim=True).log()
    within = torch.where(others > LOG_ZERO, shifted - total, LOG_ZERO)
    return torch.cat([label, top + total], dim=-1), within
