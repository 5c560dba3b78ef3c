"""Minifinetuning: distillation from a corrected teacher."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import finite_log_probs, kl_terms


class MFT(RowLoss):
    """Minifinetuning, KL(t || q) with t = (1 - m) p + m 1_y where the teacher is wrong.

    The teacher is wrong where its most likely token is not the label y. There
    m = (p_max - p_y + threshold) / (1 + p_max - p_y) moves just enough mass that the label exceeds
    the token that was most likely by ``threshold``; elsewhere t = p. With ``everywhere`` the label
    gains ``threshold`` where the teacher is right, too, up to probability 1. Softening applies to p
    before it is corrected. The value is not 0 if student and teacher are equal, but wrong.

    Not recommended for text whose labels are no better than the teacher, such as text that a model
    generated, and not together with a cross-entropy that has a large weight, which the correction
    is meant to replace.

    Reference: Belcak et al. 2025 (Minifinetuning), arXiv:2506.15702.
    """

    zero_at_equality = False
    temperature_power = 1

    threshold: float = Field(
        0.2, ge=0, lt=1, description="the label's lead over the token that was most likely"
    )
    everywhere: bool = Field(
        False, description="also raise the label by the threshold where the teacher is right"
    )

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Forward KL from the corrected teacher."""
        target = self._target(teacher_log_probs, labels.unsqueeze(-1))
        return kl_terms(target, student_log_probs).sum(-1)

    def _target(self, log_probs: Tensor, label: Tensor) -> Tensor:
        top = log_probs.amax(-1, keepdim=True)
        of_label = log_probs.gather(-1, label)
        wrong = of_label < top
        p_label = of_label.exp()
        lead = top.exp() - p_label
        share = torch.where(wrong, (lead + self.threshold) / (1 + lead), 0.0)
        if self.everywhere:
            rest = (1 - p_label).clamp_min(torch.finfo(log_probs.dtype).tiny)
            right = (self.threshold / rest).clamp_max(1.0)
            share = torch.where(wrong, share, right)
        corrected = finite_log_probs(log_probs + (-share).log1p().clamp_min(-1e30))
        raised = finite_log_probs((p_label * (1 - share) + share).log())
        corrected = torch.where(
            torch.arange(log_probs.shape[-1], device=label.device) == label, raised, corrected
        )
        return torch.where(share > 0, corrected, log_probs)
