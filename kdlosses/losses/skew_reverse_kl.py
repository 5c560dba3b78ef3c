"""Skew reverse Kullback-Leibler divergence."""

from pydantic import Field
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms, mix


class SkewReverseKL(Divergence):
    """Skew reverse KL, KL(q || (1 - alpha) p + alpha q).

    Reverse KL with a share of the student in the mixture: bounded by log(1 / alpha), and finite if
    the teacher assigns probability 0 to a token.

    Not recommended with alpha near 1: value and gradient vanish with (1 - alpha)^2.

    Reference: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """

    coarse_graining_monotone = True

    alpha: float = Field(0.1, ge=0, lt=1, description="the student's share in the mixture")

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The KL terms from the student to the mixture."""
        log_mixture, mixture = mix(student_log_probs, teacher_log_probs, self.alpha)
        return kl_terms(student_log_probs, log_mixture, mixture)

    def curvature(self) -> float:
        """``(1 - alpha)^2``, 0.81 by default."""
        return (1 - self.alpha) ** 2
