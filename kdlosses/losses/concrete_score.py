"""Concrete score distillation."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import LOG_ZERO

Weights = Literal["teacher", "student", "uniform"]

_LARGEST = 1e15  # of a log ratio: it represents infinity, and so does its square


class ConcreteScore(RowLoss):
    """Concrete score, sum_xy u_x v_y [(log q_x - log q_y) - (log p_x - log p_y)]^2.

    The student should reproduce the difference between the logits of each pair of tokens. The
    weights of a pair are the product of ``u`` and ``v``, each the teacher's or the student's
    distribution or uniform; no gradient flows through them. With d = log(q / p) the sum over pairs
    is Var_u d + Var_v d + (E_u d - E_v d)^2, which is linear in the size of the vocabulary. Student
    weights seek modes, teacher weights cover them. Uniform weights leave out tokens that both sides
    rule out.

    Not recommended with uniform weights and a large vocabulary: tokens that never occur then decide
    the value. Squares of large differences make the gradient of a student that starts far from the
    teacher large; consider clipping it.

    Reference: Kim et al. 2025 (Distillation of Large Language Models via Concrete Score Matching),
    arXiv:2509.25837.
    """

    detached = ("weights",)
    supports_top_k = True

    u: Weights = Field("student", description="weights of one token: teacher, student or uniform")
    v: Weights = Field("student", description="weights of the other: teacher, student or uniform")

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The two variances and the squared distance of the means."""
        x = (student_log_probs - teacher_log_probs).clamp(-_LARGEST, _LARGEST)
        u = _weights(self.u, teacher_log_probs, student_log_probs.detach())
        mean_u = (u * x).sum(-1, keepdim=True)
        variance_u = (u * (x - mean_u) ** 2).sum(-1)
        if self.u == self.v:
            return 2 * variance_u
        v = _weights(self.v, teacher_log_probs, student_log_probs.detach())
        mean_v = (v * x).sum(-1, keepdim=True)
        variance_v = (v * (x - mean_v) ** 2).sum(-1)
        return variance_u + variance_v + (mean_u - mean_v).squeeze(-1) ** 2

    def curvature(self) -> float | None:
        """4, or None with uniform weights, where rare tokens count as much as others."""
        return None if "uniform" in (self.u, self.v) else 4.0


def _weights(kind: Weights, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    if kind == "teacher":
        return teacher_log_probs.exp()
    if kind == "student":
        return student_log_probs.exp()
    possible = torch.maximum(teacher_log_probs, student_log_probs) > LOG_ZERO / 2
    return possible / possible.sum(-1, keepdim=True).to(teacher_log_probs.dtype)
