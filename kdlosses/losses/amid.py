"""Distillation with an alpha-mixture as assistant."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import alpha_beta_terms, finite_log_probs, kl_terms, log_softmax, moves

_CLOSEST = 1e-6  # distance of a scheduled exponent from 0
_ALPHA, _BETA = 0.2, 0.7  # of the alpha-beta divergence, as the authors choose them


class AMiD(RowLoss):
    """Alpha-mixture distillation, D(p || r) with r ~ (s p^a + (1 - s) q^a)^(1 / a).

    The assistant r is a power mean of teacher and student with the teacher's share s and the
    exponent a = (1 - alpha) / 2, normalised:
    alpha = -1 is the arithmetic mean (order ``pr`` is then the skew forward KL), 0 the mean of
    square roots, 1 the geometric mean. Lower alpha follows the larger of the two probabilities,
    alpha towards 1 the smaller. ``order`` names the arguments of D: teacher p or student q against
    r, or the reverse. The gradient flows through r.

    Not recommended with a share near 1 for the orders ``pr`` and ``rp``, or near 0 for the others,
    because value and gradient then vanish. At alpha = 1, rows in which teacher and student have no
    possible token in common have no meaningful value.

    Reference: Shin et al. 2025 (AMiD), arXiv:2510.15982.
    """

    supports_top_k = True

    alpha: float = Field(0.5, ge=-10, le=1, description="order of the mean")
    share: float = Field(0.5, gt=0, lt=1, description="the teacher's share in the mean")
    order: Literal["pr", "qr", "rp", "rq"] = Field(
        "pr", description="arguments of the divergence: teacher p, student q, assistant r"
    )
    divergence: Literal["kl", "alpha_beta"] = Field(
        "kl", description="kl, or alpha_beta with exponents 0.2 and 0.7"
    )

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The divergence between one side and the assistant."""
        assistant = self._assistant(teacher_log_probs, student_log_probs)
        sides = {"p": teacher_log_probs, "q": student_log_probs, "r": assistant}
        first, second = (sides[side] for side in self.order)
        if self.divergence == "kl":
            return kl_terms(first, second).sum(-1)
        return alpha_beta_terms(_BETA, _ALPHA, _ALPHA + _BETA, second, first, False).sum(-1)

    def _assistant(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        power, share = (1 - self.alpha) / 2, self.share
        if moves(self.alpha):
            power = torch.as_tensor(power).clamp_min(_CLOSEST)  # type: ignore[assignment]
        elif power == 0:
            return finite_log_probs(log_softmax(share * log_p + (1 - share) * log_q))
        # From the larger side, so that no power overflows; the clamps keep the unused form finite.
        x = log_p - log_q
        from_student = log_q + (share * (power * x.clamp_max(0)).expm1()).log1p() / power
        from_teacher = log_p + ((1 - share) * (power * (-x).clamp_max(0)).expm1()).log1p() / power
        return finite_log_probs(log_softmax(torch.where(x > 0, from_teacher, from_student)))

    def curvature(self) -> float | None:
        """The squared share of the other side in r, or None with ``alpha_beta``."""
        if self.divergence != "kl":
            return None
        return (1 - self.share) ** 2 if "p" in self.order else self.share**2
