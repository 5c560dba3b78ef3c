"""Skew forward Kullback-Leibler divergence."""

from pydantic import Field
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms, mix


class SkewForwardKL(Divergence):
    """Skew forward KL, KL(p || alpha p + (1 - alpha) q).

    The teacher's share in the mixture bounds the value by log(1 / alpha) and keeps the gradient
    finite if the student assigns no mass to a token. DistiLLM reports faster convergence than with
    KL.

    Not recommended with alpha near 1: value and gradient vanish with (1 - alpha)^2.

    Reference: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """

    coarse_graining_monotone = True

    alpha: float = Field(0.1, ge=0, lt=1, description="the teacher's share in the mixture")

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The KL terms from the teacher to the mixture."""
        log_mixture, mixture = mix(teacher_log_probs, student_log_probs, self.alpha)
        return kl_terms(teacher_log_probs, log_mixture, mixture)

    def curvature(self) -> float:
        """``(1 - alpha)^2``, 0.81 by default."""
        return (1 - self.alpha) ** 2
