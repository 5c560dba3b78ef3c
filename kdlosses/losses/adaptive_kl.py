"""Adaptive Kullback-Leibler divergence."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import kl_terms

_STEPS = 24
_LOWEST = -40.0


class AdaptiveKL(RowLoss):
    """Adaptive KL, w KL(p || q) + (1 - w) KL(q || p) with w from the gaps in head and tail.

    The head consists of the teacher's most likely tokens up to a cumulative mass of at most
    ``mass``, and always contains the first; the tail is the rest. With g the summed gap |p - q| of
    each part, w = g_head / (g_head + g_tail), or 1/2 if both are 0. No gradient flows through w.
    The weight of the two directions therefore depends, row by row, on where the student is wrong.

    Not recommended with nearly deterministic teachers: the head is then one token, and the loss is
    forward KL with a noisy factor.

    Reference: Wu et al. 2024 (Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
    Large Language Models), arXiv:2404.02657.
    """

    detached = ("weights",)

    mass: float = Field(
        0.5, gt=0, lt=1, description="cumulative probability of the teacher that defines the head"
    )

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The two divergences, weighted by the gaps."""
        weight = self._forward_weight(teacher_log_probs, student_log_probs.detach())
        forward = kl_terms(teacher_log_probs, student_log_probs).sum(-1)
        reverse = kl_terms(student_log_probs, teacher_log_probs).sum(-1)
        return weight * forward + (1 - weight) * reverse

    def _forward_weight(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        teacher = teacher_log_probs.exp()
        gap = (teacher - student_log_probs.exp()).abs()
        head = teacher_log_probs >= self._threshold(teacher_log_probs, teacher)
        head_gap = torch.where(head, gap, 0.0).sum(-1)
        total = gap.sum(-1)
        known = total > 0
        return torch.where(known, head_gap / torch.where(known, total, 1.0), 0.5)

    def _threshold(self, log_probs: Tensor, probs: Tensor) -> Tensor:
        """The lowest log-probability in the head, ``[..., 1]``, by bisection instead of a sort."""
        top = log_probs.amax(-1, keepdim=True)
        low, high = torch.full_like(top, _LOWEST), top
        for _ in range(_STEPS):
            middle = (low + high) / 2
            fits = torch.where(log_probs >= middle, probs, 0.0).sum(-1, keepdim=True) <= self.mass
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high

    def curvature(self) -> float:
        """1, since near equality both directions agree for any weight."""
        return 1.0
