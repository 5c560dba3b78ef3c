"""Reverse Kullback-Leibler divergence."""

from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms


class ReverseKL(Divergence):
    """Reverse Kullback-Leibler divergence, KL(q || p) = sum q log(q / p).

    Mode-seeking: the student is punished for mass where the teacher has none and may leave
    out what it cannot model. The token-level objective of MiniLLM.

    Not for a student that has yet to learn the language at all: tokens it gives no mass to
    receive almost no gradient.

    Infinite where the teacher rules out a token that the student allows.

    Reference: Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """

    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``p - q - q log(p / q)``: KL's terms with the roles exchanged."""
        return kl_terms(student_log_probs, teacher_log_probs)

    def curvature(self) -> float:
        """1, as every f-divergence scaled like KL: near equality the direction does not matter."""
        return 1.0
