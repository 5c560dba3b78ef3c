"""Forward Kullback-Leibler divergence."""

from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms


class ForwardKL(Divergence):
    """Forward Kullback-Leibler divergence, KL(p || q) = sum p log(p / q).

    The classic distillation objective: the student should cover all tokens that the teacher
    considers likely. The gradient with respect to the logits is q - p.

    Not recommended for a student that is much too small to match the teacher: it then spreads its
    mass over tokens that the teacher considers unlikely, whereas reverse and skew divergences
    concentrate it.

    Infinite if the student assigns probability 0 to a token that the teacher considers possible.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """

    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``q - p - p log(q / p)``: the terms of KL, each made non-negative."""
        return kl_terms(teacher_log_probs, student_log_probs)

    def curvature(self) -> float:
        """1, the unit of curvature of the other losses."""
        return 1.0
