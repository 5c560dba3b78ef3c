"""Entropy-aware Kullback-Leibler divergence."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import kl_terms


class EntropyAwareKL(RowLoss):
    """Entropy-aware KL, KL(q || p) + 1[H(p) > threshold] KL(p || q).

    Reverse KL everywhere, and forward KL in addition where the teacher is uncertain: its entropy,
    in nats and after softening, exceeds ``threshold``. The student thus keeps several continuations
    where the teacher has several, and imitates one where the teacher has one. Meant for text that
    the student generates. A top-k teacher's entropy is that of its k + 1 events, which is lower.

    Not recommended for comparing training losses at different thresholds, because the value is the
    sum of two divergences in some rows and one of them in the others.

    Reference: Jin et al. 2026 (Entropy-Aware On-Policy Distillation), arXiv:2603.07079.
    """

    coarse_graining_monotone = True
    supports_top_k = True

    threshold: float = Field(
        0.8, ge=0, description="entropy of the teacher, in nats, above which forward KL is added"
    )

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Both directions where the teacher is uncertain, one elsewhere."""
        entropy = -(teacher_log_probs.exp() * teacher_log_probs).sum(-1)
        forward = kl_terms(teacher_log_probs, student_log_probs).sum(-1)
        reverse = kl_terms(student_log_probs, teacher_log_probs).sum(-1)
        return reverse + torch.where(entropy > self.threshold, forward, 0.0)
