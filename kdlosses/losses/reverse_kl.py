"""Reverse Kullback-Leibler divergence."""

from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms


class ReverseKL(Divergence):
    """Reverse Kullback-Leibler divergence, KL(q || p) = sum q log(q / p).

    Mode-seeking: the student is penalised for mass on tokens that the teacher considers unlikely,
    and may ignore what it cannot model. The token-level objective of MiniLLM.

    Not recommended for an untrained student, because tokens to which it assigns almost no mass
    receive almost no gradient.

    Infinite if the teacher assigns probability 0 to a token that the student considers possible.

    Reference: Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """

    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``p - q - q log(p / q)``: the terms of KL with the roles exchanged."""
        return kl_terms(student_log_probs, teacher_log_probs)

    def curvature(self) -> float:
        """1, since near equality both directions of KL agree."""
        return 1.0
